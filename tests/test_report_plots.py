"""Instruments over steps, quality against compute and against tokens: synthetic files in, plots
out."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest

from sememe.errors import CheckpointError
from sememe.report import meanings, write_report
from sememe.report.comparison import points as all_points
from sememe.report.files import Metrics, read_run
from sememe.report.instruments import instrument_plots
from sememe.report.pareto import pareto_plot
from sememe.report.sweeps import Point, front, read_sweep
from sememe.report.tokens import of_log, of_sweep, slope, tokens_plot
from test_report import EVALUATE, HOSTILE, Seen, build_run, sample, write_metrics

TITLES = [one.title for one in meanings.INSTRUMENTS] + ["Held-out NLL by position", "Tail lengths"]


def full_line(step: int) -> dict:
    """A line with every key that the trainer may write."""
    line = {
        key: 1.0 + step % 7
        for one in meanings.INSTRUMENTS
        for panel in one.panels
        for key in panel.curves
    }
    return line | {
        "step": step,
        "tokens": 512 * step,
        "loss": 3.0,
        "heldout_nll": 4 - 0.1 * math.log2(step),
        "rate": 0.5,
        "heldout_tail_histogram": [4, 3, 2, 1],
        "heldout_nll_by_position": [3.0, 2.5, 2.0],
    }


def point(name: str, share=0.5, delta=1.0, kind="concepts", **more) -> Point:
    return Point(name, kind, {"layer_share": share, "delta_nll_control": delta, "nll": 3.0}, **more)


def sweep_folder(folder: Path, points: list[dict], runs: list[dict] | None = None, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    whole = [
        {"boundary": None, "changes": {}, "trained_tokens": 1000, "runs": [p["name"]], "spread": {}}
        | p
        for p in points
    ]
    found = {
        "recipe": "tiny.yaml",
        "grid": {"rate": ["0.5", "0.25"]},
        "points": whole,
        "runs": runs or [],
    }
    (folder / "sweep.json").write_text(json.dumps(found | more))
    return folder


RATES = [
    {"name": "control", "system": "control", "mean": {"layer_share": 1.0, "nll": 3.0}},
    {
        "name": "skip",
        "system": "skip",
        "mean": {"layer_share": 0.27, "nll": 5.0, "delta_nll_control": 2.0},
    },
    {
        "name": "window",
        "system": "window",
        "mean": {"layer_share": 0.9, "nll": 3.4, "delta_nll_control": 0.4},
    },
    {
        "name": "rate-0.5",
        "system": "online",
        "boundary": "null",
        "changes": {"rate": "0.5"},
        "mean": {"layer_share": 0.63, "nll": 4.0, "delta_nll_control": 1.0},
        "spread": {"delta_nll_control": 0.1},
    },
    {
        "name": "rate-0.5_fixed",
        "system": "online",
        "boundary": "fixed",
        "mean": {"layer_share": 0.64, "nll": 4.2, "delta_nll_control": 1.2},
    },
    {
        "name": "rate-0.1",
        "system": "online",
        "boundary": "null",
        "mean": {"layer_share": 0.3, "nll": 4.2},
    },
]


def test_each_instrument_is_drawn_from_its_keys_and_explained():
    plots = instrument_plots(Metrics([full_line(step) for step in range(1, 41)]))
    assert [plot.title for plot in plots] == TITLES
    for plot in plots:
        assert (
            Seen(plot.svg).tags.count("svg") == 1
            and plot.caption.endswith(".")
            and len(plot.caption) > 60
        )
    by_title = {plot.title: plot.svg for plot in plots}
    for words, title in (
        (("set to zero", "shuffled"), "Cost of ablating the codes"),
        (("LoRA", "bridge"), "Gradient norms"),
        (("0–64", "128–192"), "Held-out NLL by position"),
        (("bits", "perplexity"), "Codes in use"),
    ):
        assert all(word in by_title[title] for word in words), title


def test_nothing_is_drawn_that_is_not_in_the_file():
    assert instrument_plots(Metrics([{"step": 1, "loss": 3.0}])) == []
    only = [{"step": step, "soft_hard_cosine": 0.5} for step in (1, 2)]
    assert [plot.title for plot in instrument_plots(Metrics(only))] == [
        "Soft mixture against chosen code"
    ]
    assert "distance" not in Seen(instrument_plots(Metrics(only))[0].svg).text, "no empty panel"


@pytest.mark.parametrize(
    "junk", [None, "text", [], {}, math.nan, True, [None, "x"], [0, 0], 10**400]
)
def test_unexpected_values_draw_nothing(junk):
    lines = [
        {"step": step}
        | dict.fromkeys([*full_line(1)][:-2], junk)
        | {"step": step, "heldout_tail_histogram": junk, "heldout_nll_by_position": junk}
        for step in (1, 2)
    ]
    assert not [
        p for p in instrument_plots(Metrics(lines)) if p.title != "Held-out NLL by position"
    ]


def test_a_norm_of_zero_has_no_place_on_a_logarithmic_axis():
    lines = [{"step": step, "grad_norm": 1.0, "grad_norm_codes": 0.0} for step in (1, 2, 3)]
    text = Seen(instrument_plots(Metrics(lines))[0].svg).text
    assert "codes" not in text and "all" not in text.split(), (
        "one curve needs no legend, and the zeros are no curve"
    )


def test_front_is_what_nothing_beats():
    listed = [
        point("a", 0.3, 2.0),
        point("b", 0.5, 1.0),
        point("worse", 0.6, 1.1),
        point("same share", 0.5, 1.5),
        point("c", 0.8, 0.2),
        point("no figure", None, None),
        point("control", 1.0, 0.0, "control"),
    ]
    assert [p.name for p in front(listed)] == ["a", "b", "c", "control"]


def test_sweep_page_shows_points_baselines_and_front(tmp_path):
    runs = [{"name": "bad", "fault": f"rate is wrong {HOSTILE}"}]
    page = write_report(sweep_folder(tmp_path / "a<b>", RATES, runs))
    assert page == tmp_path / "a<b>" / "sweep.html"
    html = page.read_text(encoding="utf-8")
    seen = Seen(html)
    assert not seen.open and "script" not in seen.tags and "a&lt;b&gt;" in html
    for words in (
        "sliding window + sinks",
        "skip + LoRA",
        "concepts, fixed stride",
        "front",
        "63 %",
        "+1.0000 ± 0.1000",
        "Not drawn: 1 without a figure",
        "standard deviation",
        "rate is wrong",
        "1 runs failed",
        "1,000 training tokens",
    ):
        assert words in seen.text, words
    rows = re.findall(r"<td><code>([^<]*)</code></td>.*?<td>(yes|)</td></tr>", html)
    assert [name for name, on in rows if on] == ["control", "skip", "window", "rate-0.5"]
    assert all(link.startswith("#") for link in seen.values("href")) and seen.values("href")
    assert len(seen.values("id")) == len(set(seen.values("id")))
    assert not re.findall(r"https?://", html)
    assert html == write_report(page.parent).read_text(encoding="utf-8"), "same files, same page"


def test_points_without_a_control_are_not_compared(tmp_path):
    page = write_report(sweep_folder(tmp_path / "alone", RATES[-1:]))
    text = Seen(page.read_text()).text
    assert "svg" not in Seen(page.read_text()).tags
    assert "sememe sweep with --control trains one" in text and "rate-0.1" in text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"points": 3}', "[" * 100_000])
def test_a_damaged_sweep_is_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"got .*sweep\.json, which is no sweep.*try: "):
        write_report(tmp_path)


@pytest.mark.parametrize("junk", [None, 7, "text", [], {"a": 1}, math.nan])
def test_unexpected_shapes_in_a_sweep(tmp_path, junk):
    points = [dict.fromkeys(RATES[3], junk), {}, RATES[0]]
    (tmp_path / "sweep.json").write_text(
        json.dumps({"points": points, "runs": junk, "grid": junk, "recipe": junk})
    )
    assert not Seen(write_report(tmp_path).read_text()).open


def numbers_in(svg: str) -> dict[str, tuple[float, float]]:
    """Where the labels of points stand (8-point text in the muted colour; ticks are larger)."""
    found = re.findall(
        r"<text style=\"font-size: 8px; text-anchor: middle[^\"]*\"[^>]*?(?:x=\"([\d.]+)\" "
        r"y=\"([\d.]+)\")[^>]*>"
        r"(\d+)</text>",
        svg,
    )
    return {text: (float(x), float(y)) for x, y, text in found}


@pytest.mark.parametrize("spread", [0.03, 0.012])
def test_numbers_of_points_do_not_cover_each_other(spread):
    listed = [point("skip", 0.2, 2.2, "skip")]
    listed += [
        point(f"p{i}", 0.4 + spread * i, 1.5 - 3 * spread * i + 0.02 * (i % 3)) for i in range(12)
    ]
    places = numbers_in(pareto_plot(listed).svg)
    assert set(places) == {str(i) for i in range(1, 14)}
    for (a, (x, y)), (b, (u, v)) in itertools.combinations(places.items(), 2):
        wide = 4.6 * (len(a) + len(b)) / 2  # a digit of 8-point text is 4.6 wide and 6 high
        assert abs(x - u) >= wide or abs(y - v) >= 6, (a, b)


def test_one_model_is_no_front():
    assert pareto_plot([point("a"), point("control", kind="control")]) is None
    plot = pareto_plot([point("a"), point("b", 0.6, 0.5, spread={"delta_nll_control": None})])
    assert "Bars" not in plot.caption, "one seed has no spread"
    assert "control" in Seen(plot.svg).text, (
        "what the deltas are to is drawn, though no run of it is among the points"
    )


def test_slope_is_nats_per_doubling():
    assert slope([(2.0**k, 5 - 0.25 * k) for k in range(4)]) == pytest.approx((-0.25, 5.0))
    assert slope([(2.0, 5.0), (4.0, 4.0)]) is None, "two points are no trend"
    assert slope([(2.0, 5.0)] * 3) is None


def test_only_what_is_after_the_schedule_is_fitted():
    lines = [
        {
            "step": s,
            "tokens": 100 * s,
            "heldout_nll": 3.0 + s,
            "quantise": min(1, s / 4),
            "target_rate": 0.25 if s > 2 else 1,
        }
        for s in range(1, 9)
    ]
    control = [{"step": s, "tokens": 100 * s, "heldout_nll": 2.0} for s in range(2, 9)]
    found = of_log("r", Metrics(lines), Metrics(control))
    assert [x for x, _ in found.nll] == [100 * s for s in range(1, 9)]
    assert [x for x, _ in found.settled] == [400, 500, 600, 700, 800]
    assert found.delta[0] == (200, 3.0) and found.settled_delta[0] == (400, 5.0), "at equal tokens"
    found = of_log("c", Metrics(control), Metrics([]))
    assert [x for x, _ in found.settled] == [500, 600, 700, 800], "no schedule: the second half"


def lengths(rate: str, slopes: float) -> list[Point]:
    return [
        Point(
            f"{rate}-{steps}",
            "concepts",
            {"nll": 6 + slopes * math.log2(steps), "delta_nll_control": 1.0},
            {},
            {"rate": rate, "steps": str(steps)},
            100.0 * steps,
            Path("s/r"),
        )
        for steps in (8, 16, 32)
    ]


def test_runs_that_differ_in_their_length_are_one_series():
    series = of_sweep([*lengths("0.5", -0.5), *lengths("0.25", -0.25)])
    assert [one.label for one in series] == ["rate=0.5", "rate=0.25"]
    assert slope(series[1].settled)[0] == pytest.approx(-0.25)
    text = Seen(tokens_plot(series, whole_runs=True).svg).text
    assert "rate=0.5 (−0.500)" in text and "minus control" in text
    assert of_sweep([lengths("0.5", 1)[0], lengths("0.25", 1)[0]]) == [], (
        "all of one length: nothing to fit"
    )


def test_too_many_series_are_said():
    plot = tokens_plot(
        [
            of_log(f"r{i}", Metrics([full_line(s) for s in (1, 2, 4, 8)]), Metrics([]))
            for i in range(9)
        ]
    )
    assert "Not drawn: 3 more." in plot.caption
    assert tokens_plot([]) is None


def test_a_run_beside_a_sweep(tmp_path):
    run = build_run(tmp_path / "tiny")
    figures = EVALUATE | {"layer_share": 0.55, "system": "online", "boundary": "null"}
    (run / "evaluate.json").write_text(json.dumps(figures))
    folder = sweep_folder(tmp_path / "rates", RATES)
    names = [p.name for p in all_points([read_run(run), read_sweep(folder)])]
    assert names == ["tiny", *(f"rates/{p['name']}" for p in RATES)]
    text = Seen(write_report(run, None, [folder]).read_text()).text
    assert "rates/rate-0.5" in text and "Quality against compute" in text and "this run" in text
    assert "Quality against compute" not in Seen(write_report(run).read_text()).text, (
        "alone, there is nothing to compare"
    )
    with pytest.raises(CheckpointError, match=r"a sweep, and --control"):
        write_report(folder, run)


def test_the_curves_of_a_sweep_are_those_of_its_runs(tmp_path):
    folder = sweep_folder(tmp_path / "rates", RATES, [{"name": "rate-0.5", "control": "control"}])
    for name, more in (("rate-0.5", 1.0), ("control", 0.0)):
        write_metrics(
            folder / name,
            [{"step": s, "tokens": 100 * s, "heldout_nll": 3 + more} for s in range(1, 9)],
        )
    text = Seen(write_report(folder).read_text()).text
    assert "rate-0.5 (+0.000)" in text and "minus control" in text


def test_a_page_with_everything_stays_small(tmp_path):
    run = build_run(tmp_path / "tiny")
    write_metrics(run, [full_line(step) for step in range(1, 20_001)])
    (run / "evaluate.json").write_text(
        json.dumps(
            EVALUATE
            | {
                "samples": [sample('&<" ' * 20_000) for _ in range(8)],
                "code_counts": [5] * 65_536,
                "layer_share": 0.5,
                "system": "online",
            }
        )
    )
    html = write_report(run, None, [sweep_folder(tmp_path / "rates", RATES)]).read_text(
        encoding="utf-8"
    )
    assert len(html.encode()) < 1_000_000
    seen = Seen(html)
    assert not seen.open and len(seen.values("id")) == len(set(seen.values("id")))
    assert all(f"<h3>{title}</h3>" in html for title in TITLES)
