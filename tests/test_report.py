"""The report page: synthetic run and sweep folders in, one self-contained HTML page out."""

import base64
import json
import math
import re
from html import unescape
from pathlib import Path

import pytest

from sememe.errors import CheckpointError, RecipeError
from sememe.report import write_report
from sememe.report.files import read_metrics
from sememe.report.samples import segments

HOSTILE = "<script>alert('x')</script> & \"more\""
RIVER = "The river runs past the mill, and nobody in the village\ncould say why it was so quiet. "


def line(step: int, offset: float = 0.0) -> dict:
    """What a run logs; held-out figures and searches now and then."""
    figures = {"step": step, "tokens": step * 4096, "loss": 3 + 5 * math.exp(-step / 20) + offset}
    figures |= {"target_nll": 2 + 3 * math.exp(-step / 20), "rate": 0.25, "target_rate": 0.25}
    figures |= {"plan_perplexity": [20.0, 60.0], "codes_used": 700, "em_flips": 4 / step}
    if step % 50 == 0:
        figures |= {"heldout_nll": 3.1 + offset, "heldout_rate": 0.26, "em_nll": 2.0}
        figures |= {"delta_nll_zero": 1.0, "delta_nll_shuffle": 0.3, "em_nll_planner": 2.2}
    return figures


def sample(words: str, every: int = 4) -> dict:
    texts = enumerate(re.findall(r"\s?\S+|\s", words))
    concepts = ((x, None if i % every or i == 0 else i % 8 * 37_000, i == 0) for i, x in texts)
    return {"pieces": [dict(zip(("text", "concept", "sink"), x, strict=True)) for x in concepts]}


CODES = {"num_concepts": 4096, "codes_per_concept": 2}
ONLINE = {"system": "online", "data": "wiki.txt", "tokens": 65536, "nll": 3.4321, **CODES}
ONLINE |= {"compression_ratio": 3.98, "layer_share": 0.55, "largest_code_share": float("nan")}
ONLINE |= {"delta_nll_control": 0.123, "delta_nll_zero": 1.75, "delta_nll_shuffle": 0.31}
ONLINE["dial"] = [{"target_rate": 0.5, "nll": 3.2, "delta_nll_control": None}]
ONLINE["samples"] = [sample(RIVER * 3), sample(f"Text {HOSTILE} https://example.org/a", every=3)]
PLANNER = {"nll_posterior": 2.2, "delta_nll_shuffle": 0.001, "plan_perplexity": [21.123456789, 140]}
PLANNER["given"] = [{"given": "planner", "nll": 2.5}, {"given": "posterior", "nll": 2.2}]
PLANNER["signals"] = {"length": {"loss": 0.5, "accuracy": 0.75}}
PLANNER["samples"] = [{"source": f"Of {HOSTILE}", "plan": [[7, 7], [501]], "written": "A"}]
BENCHMARK = {"decode_speedup": 0.9, "settings": {"dtype": "float32"}}
BENCHMARK["concept"] = {"decode_tokens_per_s": 61.5, "cache_bytes": 1_234_567}
BENCHMARK["base"] = {"decode_tokens_per_s": 5123.4, "cache_bytes": 3_703_701}
ABLATE = {"zero": {"delta_nll": 1.7}, "drop": [{"share": 0.5, "delta_nll": 0.8}]}
POINTS = [
    {"name": name, "system": name.split("-")[0], "boundary": boundary, "spread": {}}
    | {"mean": dict(nll=3.0, layer_share=share, cache_share=cache, delta_nll_control=delta)}
    for name, boundary, share, cache, delta in (
        ("control", None, None, None, None),
        ("prune", None, 0.60, 0.60, 0.9),
        ("rate-0.5", "null", 0.63, 0.55, 1.0),
        ("rate-0.5_fixed", "fixed", 0.64, 0.56, 1.2),
        ("window", None, 1.0, 0.55, 0.1),
    )
]
POINTS[2] |= {"spread": {"delta_nll_control": 0.1}, "trained_tokens": 1000}


def build(folder: Path, system: str = "online", **files: dict) -> Path:
    """A run folder with a control beside it."""
    for name, offset in ((folder.name, 0.0), (f"{folder.name}-control", -0.12)):
        log = folder.with_name(name)
        log.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line(step, offset)) + "\n" for step in range(1, 301))
        (log / "metrics.jsonl").write_text(text)
        (log / "recipe.yaml").write_text(f"system: {system}\n# {HOSTILE}\n")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build(tmp_path / "tiny", evaluate=ONLINE, benchmark=BENCHMARK, ablate=ABLATE)


def sweep(folder: Path, points: list, *runs: dict) -> Path:
    folder.mkdir()
    content = {"recipe": "tiny.yaml", "points": points, "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


def page(folder: Path, *rest: Path) -> str:
    return write_report(folder, *rest).read_text(encoding="utf-8")


def shown(html: str) -> str:
    """What a reader sees of a page."""
    return unescape(re.sub(r"<[^>]*>", "", html))


def values(html: str, attributes: str) -> list[str]:
    return re.findall(rf'\s(?:{attributes})="([^"]*)"', html)


def holds(html: str, *words: str) -> None:
    for word in words:
        assert word in shown(html), word


def test_a_page_shows_the_figures_of_the_files(run, monkeypatch):
    monkeypatch.chdir(run)  # "." has a sibling
    html = page(Path("."))
    assert values(html, "alt") == ["Loss", "Concept rate", "Ablation", "Code use"]
    images = map(base64.b64decode, re.findall(r"base64,([^\"]+)", html))
    assert b"tiny-control" in b"".join(images)
    holds(html, "3.4321", "+0.1230", "3.98×", "+1.7500", "65,536", "1.23 MB", "5,123 tokens/s")
    holds(html, "1,228,800 tokens", "wiki.txt", "At other rates", "Dropping concepts")
    holds(html, "what NLL rises by with all codes replaced")
    holds(html, "unfinished", "rules could not look")  # the doctor
    assert not re.search(r"\b(nan|None|inf|Infinity)\b", shown(html))
    tones = [value for value in values(html, "class") if "tile" in value]
    assert tones == ["tiles", "tile poor", "tile ", "tile good", "tile good", "tile poor", "tile "]
    assert page(run) == html, "same files, same page"
    assert [x.name for x in run.iterdir() if "report" in x.name] == ["report.html"]


def test_a_page_is_self_contained_and_its_text_is_text(tmp_path):
    strange = ONLINE | {"data": HOSTILE, HOSTILE: 7}
    folder = build(tmp_path / "a<b>&c", evaluate=strange)
    html = page(folder)
    assert "a&lt;b&gt;&amp;c" in html
    assert shown(html).count("<script>alert('x')</script>") >= 3
    tags = re.findall(r"<(/?\w+)", html)
    assert not {"script", "link", "iframe", "object", "base"} & set(tags)
    closed = [tag for tag in tags if tag[0] != "/" and tag not in ("meta", "input", "img")]
    assert sorted(f"/{tag}" for tag in closed) == sorted(tag for tag in tags if tag[0] == "/")
    links = values(html, "src|href|srcset")
    assert links and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert re.findall(r"https?://", html) == ["https://"], "the one in the sample's text"
    assert not values(html, r"on\w+")


def test_text_is_coloured_by_concept(run):
    html = page(run)
    name = f"{4 * 37_000 // 4096}·{4 * 37_000 % 4096}"
    hues = set(re.findall(rf'--hue:([\d.]+)"[^>]*>[^<]*<sup>{name}</sup>', html))
    assert len(hues) == 1, "one colour for one concept"
    holds(html, "sink")
    words = [("Once", None), (" upon", None), (" a", None), (" time", 17), ("\n", 17), (" x", None)]
    pieces = [{"text": text, "concept": c, "sink": i == 0} for i, (text, c) in enumerate(words)]
    once, upon, line_end, tail = segments(pieces, str)
    assert once == ("Once", None, "sink") and tail == (" x", None, "")
    assert upon == (" upon a time", upon.hue, "17") and line_end == ("\n", upon.hue, "17")


def test_a_planner_has_plans(tmp_path):
    html = page(build(tmp_path / "p", "planner", evaluate=PLANNER))
    assert values(html, "alt") == ["Loss", "Ablation", "Planner against z*", "Search"]
    holds(html, "writes the target from this plan", "posterior", "21.12 · 140", HOSTILE)
    holds(html, "accuracy", "75 %", "1:501", "+0.0010")
    assert "Concept rate" not in shown(html)
    holds(html, "There is no ablate.json yet.", f"sememe ablate {tmp_path / 'p'}")


def test_a_log_is_read_with_care(tmp_path):
    """A resumed run repeats steps, and one that was killed leaves half a line."""
    steps = [(step, 9.0) for step in range(1, 6)] + [(step, 2.0) for step in range(3, 8)]
    text = "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in steps)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 8, "lo')
    assert [x["loss"] for x in read_metrics(tmp_path)] == [9, 9, 2, 2, 2, 2, 2], "the last counts"


def test_a_long_run_stays_small(run):
    text = "".join(json.dumps(line(s)) + "\n" for s in range(1, 20_001))
    (run / "metrics.jsonl").write_text(text)
    half = {"pieces": [{"text": "\ud83d", "concept": 3}]}  # half a surrogate pair is legal in JSON
    samples = [sample('&<" ' * 20_000), half]
    (run / "evaluate.json").write_text(json.dumps(ONLINE | {"samples": samples}))
    assert write_report(run).stat().st_size < 1_000_000


def test_what_is_no_run_is_one_sentence(run, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=r"got .*metrics\.jsonl.*try: .*sememe train"):
            write_report(run, folder)
    broken = sweep(tmp_path / "s", [])
    for path, text, error in (
        (run / "evaluate.json", "[", CheckpointError),
        (broken / "sweep.json", "[", CheckpointError),
        *((run / "recipe.yaml", text, RecipeError) for text in ("[", "[1, 2]", "rate: 1\n", "")),
    ):
        path.write_text(text)
        with pytest.raises(error, match=rf"{re.escape(path.name)} .*: need .* try: "):
            write_report(path.parent)


def test_a_sweep_is_one_table_and_one_plot_and_runs_are_compared_with_it(run, tmp_path):
    folder = sweep(tmp_path / "a<b>", POINTS, {"name": "bad", "fault": HOSTILE})
    html = page(folder)
    fronts = ["Quality against compute", "Quality against cache"]
    assert (folder / "sweep.html").is_file() and values(html, "alt") == fronts
    holds(html, "+1.0000", "0.1000", "fixed stride", "63 %", "1,000", HOSTILE)
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in html.split("<tr>")[2:]]
    best = {row[1]: row[-1] for row in cells[: len(POINTS)]}
    assert best == {
        "control": "compute, cache",
        "prune": "compute",
        "rate-0.5": "",
        "rate-0.5_fixed": "",
        "window": "cache",
    }
    alone = page(sweep(tmp_path / "alone", [POINTS[2] | {"mean": {"nll": 3.0}}]))
    holds(alone, "No model is measured against a control")
    assert values(alone, "alt") == []
    other = build(tmp_path / "other", evaluate=ONLINE | {"delta_nll_control": 0.5})
    compared = page(run, other, folder)
    assert "Quality against compute" in values(compared, "alt")
    holds(compared, "rate-0.5", "other", "+0.5000")
