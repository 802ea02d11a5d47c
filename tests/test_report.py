"""The report page: synthetic run folders in, one self-contained HTML page out."""

import ast
import json
import math
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sememe.report
from sememe.errors import CheckpointError
from sememe.report import write_report
from sememe.report.files import read_metrics
from sememe.report.samples import segments
from sememe.report.tiles import tiles, verdict

RIVER = (
    "The river runs past the mill, and the miller's daughter counts the carts that cross.\n"
    "One day the carts stopped coming, and nobody in the village could say why it was so quiet. "
)
HOSTILE = "<script>alert('x')</script> & \"more\""


def metrics_line(step: int, offset: float = 0.0) -> dict:
    line = {
        "step": step,
        "tokens": step * 4096,
        "seconds": step * 1.5,
        "loss": 3 + 5 * math.exp(-step / 20) + 0.05 * math.sin(step) + offset,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "rate": 0.25 + 0.02 * math.cos(step / 9),
        "target_rate": 0.25,
        "quantise": min(1.0, step / 150),
        "code_perplexity": 321.0,
        "codes_used": 700,
        "longest_tail": 15,
    }
    if step % 50 == 0:
        line |= {"heldout_nll": 3.1 + 5 * math.exp(-step / 20) + offset, "heldout_rate": 0.26}
    return line


def write_metrics(folder: Path, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def sample(words: str, every: int = 4) -> dict:
    tokens = re.findall(r"\s?\S+|\s", words)
    pieces = [{"text": t, "concept": None, "sink": False} for t in tokens]
    pieces[0]["sink"] = True
    for place in range(every, len(pieces), every):
        pieces[place]["concept"] = (place * 37 + len(tokens[place])) % 4096
    return {"pieces": pieces}


EVALUATE = {
    "tokens": 65536,
    "nll": 3.4321,
    "bits_per_byte": 1.0987,
    "concept_rate": 0.2512,
    "compression_ratio": 3.98,
    "nll_at_concepts": 3.61,
    "nll_in_tail": 3.37,
    "longest_tail": 15,
    "delta_nll_control": 0.123,
    "delta_nll_zero": 1.75,
    "delta_nll_shuffle": 0.31,
    "delta_nll_random": 0.9,
    "code_perplexity": 812.5,
    "codes_used": 1500,
    "largest_code_share": float("nan"),
    "data": "wiki.txt",
    "nll_by_position": [
        {"from": 64 * i, "to": 64 * i + 64, "nll": 4 - 0.15 * i, "control_nll": 3.9 - 0.15 * i}
        for i in range(6)
    ],
    "code_counts": [math.ceil(900 / (rank + 1)) for rank in range(1500)],
    "num_concepts": 4096,
    "samples": [
        sample(RIVER * 3),
        sample(f"Some hostile text {HOSTILE} that must be shown, not run: https://example.org/a", every=3),
    ],
}  # fmt: skip
BENCHMARK = {
    "concept": {
        "prefill_tokens_per_s": 5123.4,
        "decode_tokens_per_s": 61.5,
        "cache_bytes": 1_234_567,
        "train_tokens_per_s": None,
    },
    "base": {
        "prefill_tokens_per_s": 4000.0,
        "decode_tokens_per_s": 41.0,
        "cache_bytes": 3_703_701,
        "train_tokens_per_s": 900.0,
    },
    "prefill_speedup": 1.28,
    "decode_speedup": 1.5,
    "cache_reduction": 3.0,
    "ceiling_decode_speedup": 1.77,
    "train_step_ratio": None,
    "settings": {"prompt": 512, "dtype": "float32", "device": "cpu"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "tiny")


def build_run(folder: Path) -> Path:
    write_metrics(folder, [metrics_line(step) for step in range(1, 301)])
    write_metrics(
        folder.with_name(folder.name + "-control"), [metrics_line(s, -0.12) for s in range(1, 301)]
    )
    (folder / "recipe.yaml").write_text(f"name: tiny\n# {HOSTILE}\n")
    (folder / "env.json").write_text(json.dumps({"torch": "2.11", "note": HOSTILE}))
    (folder / "evaluate.json").write_text(json.dumps(EVALUATE))
    (folder / "benchmark.json").write_text(json.dumps(BENCHMARK))
    return folder


class Seen(HTMLParser):
    """What a browser would find: element names, attributes, ids, text."""

    VOID = frozenset({"meta", "input", "link", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def written(run: Path, control: Path | None = None) -> str:
    return write_report(run, control).read_text(encoding="utf-8")


def test_page_shows_the_figures_of_the_files(run):
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    seen = Seen(html)
    assert not seen.open
    assert html.lower().startswith("<!doctype html>")
    titles = (
        "Loss",
        "Concept rate",
        "Quality against training tokens",
        "NLL by position",
        "Code usage",
        "Codes in use",
        "Gradient norms",
    )
    assert seen.tags.count("svg") == seen.tags.count("figure") == len(titles)
    assert all(f"<h3>{title}</h3>" in html for title in titles)
    figures = (
        "3.4321",
        "+0.1230",
        "3.98×",
        "+1.7500",
        "+0.3100",
        "65,536",
        "1.50×",
        "3.00×",
        "1.235 MB",
    )
    for figure in (
        *figures,
        "5,123 tokens/s",
        "wiki.txt",
        "float32",
        "1,228,800 tokens",
        "tiny-control",
    ):
        assert figure in seen.text, figure
    assert "below its ceiling of 1.77×" in seen.text
    assert "within the 0.15 aimed at for R ≤ 4" in seen.text
    assert "The concepts are used" in seen.text
    assert "control, held out" in seen.text  # the legend of the loss plot
    assert "1,500 of 4,096 codes" in seen.text
    assert path.stat().st_size < 1_000_000
    assert [p.name for p in run.iterdir() if "report" in p.name] == [
        "report.html"
    ]  # no temporary file stays


def test_not_finite_and_null_are_not_available(run):
    seen = Seen(written(run))
    assert re.search(r"largest_code_share\s*n/a", seen.text)
    assert re.search(r"train_step_ratio\s*n/a", seen.text)
    assert not re.search(r"\b(nan|None|inf|Infinity)\b", seen.text)


def test_all_text_is_escaped(run):
    figures = EVALUATE | {"data": HOSTILE, "surprise": {"deep": HOSTILE}, HOSTILE: 7}
    (run / "evaluate.json").write_text(json.dumps(figures))
    measured = BENCHMARK | {"settings": {HOSTILE: HOSTILE}, "new": HOSTILE}
    (run / "benchmark.json").write_text(json.dumps(measured))
    html = written(run)
    seen = Seen(html)
    assert "script" not in seen.tags and "<script" not in html
    assert seen.text.count("<script>alert('x')</script>") >= 5
    assert not any(name.startswith("on") for _, name, _ in seen.attributes)


def test_run_folder_name_is_escaped(tmp_path):
    html = written(build_run(tmp_path / "a<b>&c"))
    assert "a&lt;b&gt;&amp;c" in html and "<b>" not in html


def test_page_refers_to_nothing_outside_itself(run):
    html = written(run)
    seen = Seen(html)
    links = (
        seen.values("href") + seen.values("src") + seen.values("xlink:href") + seen.values("srcset")
    )
    assert links and all(link.startswith("#") for link in links)
    assert set(links) <= {"#" + name for name in seen.values("id")}
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(seen.tags)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    # The one address on the page is that in the sample's text.
    assert re.findall(r"https?://", html) == ["https://"]


def test_ids_are_unique_across_the_figures(run):
    ids = Seen(written(run)).values("id")
    assert len(ids) == len(set(ids))


def test_same_files_same_page(run):
    assert written(run) == written(run)


@pytest.mark.parametrize("command", ["evaluate", "benchmark"])
def test_missing_file_names_the_command(run, command):
    (run / f"{command}.json").unlink()
    text = Seen(written(run)).text
    assert f"There is no {command}.json in this run folder yet." in text
    assert f"sememe {command} {shlex.quote(str(run))}" in text
    assert "not measured" in text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", "[" * 100_000])
def test_damaged_evaluation_does_not_stop_the_page(run, content):
    (run / "evaluate.json").write_text(content)
    assert "evaluate.json is there but is not a readable JSON object." in Seen(written(run)).text


@pytest.mark.parametrize(
    "junk", [None, 7, "text", [None, 7, "text", []], {"a": 1}, [{}], [{"pieces": 3}]]
)
def test_unexpected_shapes_draw_nothing(run, junk):
    broken = dict.fromkeys(EVALUATE, junk)
    (run / "evaluate.json").write_text(json.dumps(broken))
    (run / "benchmark.json").write_text(json.dumps(dict.fromkeys(BENCHMARK, junk)))
    assert not Seen(written(run)).open


def test_only_metrics(tmp_path):
    write_metrics(tmp_path / "bare", [{"step": 1}])
    seen = Seen(written(tmp_path / "bare"))
    assert "svg" not in seen.tags
    assert "metrics.jsonl holds no loss and no rate to draw." in seen.text
    assert "no recipe.yaml" in seen.text and "no env.json" in seen.text


def test_one_logged_step_is_a_visible_point(tmp_path):
    write_metrics(tmp_path / "short", [{"step": 1, "loss": 3.0, "rate": 0.0, "quantise": 0}])
    seen = Seen(written(tmp_path / "short"))
    assert seen.tags.count("svg") == 2 and "step" in seen.text


def test_resumed_run_keeps_the_last_line_of_a_step(tmp_path):
    lines = [{"step": s, "loss": 9.0} for s in range(1, 6)] + [
        {"step": s, "loss": 2.0} for s in range(3, 8)
    ]
    write_metrics(tmp_path, lines)
    found = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in found.lines] == [
        (1, 9.0), (2, 9.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)
    ]  # fmt: skip


def test_half_a_line_and_bad_losses_are_said(tmp_path):
    lines = [{"step": 1, "tokens": 8, "loss": 3.0}, {"step": 2, "tokens": 16, "loss": math.nan}]
    write_metrics(tmp_path / "cut", lines)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3, "lo')
    text = Seen(written(tmp_path / "cut")).text
    assert "1 unreadable lines of metrics.jsonl skipped" in text
    assert "Not drawn: 1 logged losses" in text


def test_long_runs_and_long_texts_stay_small(run):
    write_metrics(run, [metrics_line(step) for step in range(1, 20_001)])
    long = EVALUATE | {
        "samples": [sample('&<" ' * 20_000) for _ in range(8)],
        "code_counts": [5] * 65_536,
    }
    (run / "evaluate.json").write_text(json.dumps(long))
    html = written(run)
    assert len(html.encode()) < 1_000_000
    assert "8 of the samples are shortened or left out" in html
    assert html.count('class="sample"') == 1
    assert "mean of up to 50 logged lines" in html


def test_half_a_surrogate_pair_can_be_written(run):
    pieces = [
        {"text": "a", "concept": None, "sink": True},
        {"text": "\ud83d", "concept": 3, "sink": False},
    ]
    (run / "evaluate.json").write_text(json.dumps(EVALUATE | {"samples": [{"pieces": pieces}]}))
    assert "concept 3 · segment of 1 token" in written(run)


@pytest.mark.parametrize("make", [False, True])
def test_refuses_what_is_no_run(tmp_path, make):
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    with pytest.raises(
        CheckpointError, match=r"got .*nothing, .*metrics\.jsonl.*try: .*sememe train"
    ):
        write_report(folder)


def test_refuses_an_empty_log_and_a_missing_control(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"got .*elsewhere"):
        write_report(run, control=tmp_path / "elsewhere")
    (run / "metrics.jsonl").write_text("\n")
    with pytest.raises(CheckpointError, match=r"without one readable line"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_control_is_the_one_named_or_the_sibling_or_none(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run)
    assert "control: tiny-control" in Seen(written(Path("."))).text  # '.' still has a sibling
    write_metrics(tmp_path / "other", [metrics_line(step) for step in range(1, 5)])
    assert "control: other" in Seen(written(run, tmp_path / "other")).text
    (tmp_path / "tiny-control" / "metrics.jsonl").unlink()
    text = Seen(written(run)).text
    assert "control: none beside" in text and "No control run was found" in text


def test_segments_hold_tail_and_writer():
    words = [
        ("Once", None, True),
        (" upon", None, False),
        (" a", None, False),
        (" time", 17, False),
    ]
    words += [("\n", 17, False), (" there", None, False)]
    cut = segments([{"text": t, "concept": c, "sink": s} for t, c, s in words])
    assert [(s.tail, s.writer, s.label) for s in cut] == [
        ("", "Once", "sink"), (" upon a ", "time", "17"), ("", "⏎\n", "17"), (" there", "", "")
    ]  # fmt: skip
    assert cut[1].title == "concept 17 · segment of 3 tokens"
    assert cut[1].hue == cut[2].hue and cut[0].hue is None
    assert cut[3].title.startswith("open tail of 1 token")


@pytest.mark.parametrize(
    ("zero", "shuffle", "tone"),
    [(0.05, 0.02, "good"), (0.049, 0.5, "poor"), (0.05, 0.019, "fair"), (None, 1, "unknown"),
     (math.nan, 1, "unknown")],
)  # fmt: skip
def test_verdict_thresholds(zero, shuffle, tone):
    assert verdict({"delta_nll_zero": zero, "delta_nll_shuffle": shuffle})[0] == tone


@pytest.mark.parametrize(
    ("speedup", "ceiling", "tone", "reading"),
    [
        (1.6, 1.77, "good", "at its ceiling"),
        (1.5, 1.77, "fair", "below its ceiling"),
        (0.9, 1.77, "poor", "no faster than the base"),
        (2.5, 1.77, "fair", "check the measurement"),
        (1.2, None, "good", "faster than the base"),
        (None, 1.77, "unknown", "not measured"),
    ],
)
def test_speed_tile(speedup, ceiling, tone, reading):
    tile = tiles({}, {"decode_speedup": speedup, "ceiling_decode_speedup": ceiling})[4]
    assert (tile.tone, reading in tile.reading) == (tone, True)


@pytest.mark.parametrize(
    ("delta", "ratio", "tone"),
    [(0.0, 9.0, "good"), (0.02, 1.5, "good"), (0.03, 1.5, "poor"), (0.05, 2.02, "good"), (0.2, 4.0, "poor"),
     (0.1, 8.0, "fair"), (0.1, None, "fair"), (None, 4.0, "unknown")],
)  # fmt: skip
def test_quality_tile_asks_more_at_low_ratios(delta, ratio, tone):
    assert tiles({"delta_nll_control": delta, "compression_ratio": ratio}, {})[0].tone == tone


def test_ratio_tile_compares_with_what_was_asked():
    figures = {"concept_rate": 0.2, "compression_ratio": 5.0}
    assert tiles(figures, {}, 0.25)[1].reading == "20 % concepts, fewer than the 25 % asked"
    assert tiles(figures, {}, 0.2)[1].tone == "good"
    assert tiles(figures, {})[1].reading == "tokens per concept"


def test_the_folder_itself_imports_only_what_it_may():
    allowed = sys.stdlib_module_names | {"jinja2", "markupsafe", "matplotlib", "yaml"}
    for file in Path(sememe.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [a.name for a in node.names]
                )
                for name in names:
                    inside = name in (
                        "sememe.errors",
                        "sememe.paths",
                        "sememe.storage",
                    ) or name.startswith("sememe.report")
                    assert inside or name.split(".")[0] in allowed, f"{file.name} imports {name}"
