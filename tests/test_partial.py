"""Evaluation, benchmark and demo are bounded in time, say how far they are, and go on where they
were stopped."""

import json
import os

import pytest

from conftest import metrics, run
from sememe import progress
from sememe.errors import CheckpointError
from sememe.evaluation import quality, speed
from sememe.evaluation.files import benchmark_files, evaluate_files
from sememe.evaluation.partial import Partial


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_folder, texts):
    """A finished run and its control."""
    from conftest import tiny_recipe

    folder, values = tmp_path_factory.mktemp("partial"), tiny_recipe(base_folder, texts)
    run(values, folder / "r")
    run({**values, "system": "control"}, folder / "r-control")
    return folder


class Stops:
    """A function that is interrupted in its `at`-th call; without `at` it counts."""

    def __init__(self, real, at: int | None = None):
        self.real, self.at, self.calls = real, at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.real(*args, **kwargs)


def test_parts_are_held_where_they_are_about_the_same(tmp_path):
    path = tmp_path / "x.partial.jsonl"
    first = Partial(path, {"weights": "a"})
    assert [first.part(key, lambda key=key: [key, 0.1]) for key in "ab"] == [["a", 0.1], ["b", 0.1]]
    with path.open("a") as file:
        file.write('{"key": "c", "val')  # a crash in the middle of a line
    again = Partial(path, {"weights": "a"})
    assert again.part("a", lambda: 1 / 0) == ["a", 0.1] and again.reused and again.seconds > 0
    assert again.part("c", lambda: 3) == 3 and not again.reused
    third = Partial(path, {"weights": "a"})
    assert third.holds("a") and third.holds("b") and third.holds("c")
    other = Partial(path, {"weights": "b"})
    assert not other.holds("a") and other.part("a", lambda: 5) == 5
    assert Partial(path, {"weights": "b"}).holds("a") and not Partial(path, {"weights": "a"}).holds(
        "a"
    )
    other.finish()
    assert not path.exists()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_that_is_only_read_costs_the_parts_alone(tmp_path):
    tmp_path.chmod(0o500)
    assert Partial(tmp_path / "x", {}).part("a", lambda: 1) == 1


def test_evaluation_goes_on_where_it_was_stopped(runs, texts, monkeypatch):
    asked = {
        "data": str(texts[1]),
        "tokens": 1024,
        "control": str(runs / "r-control"),
        "rates": (0.5, 1.0),
    }
    whole = evaluate_files(str(runs / "r"), **asked)
    real = quality.token_nll
    monkeypatch.setattr(quality, "token_nll", Stops(real, 18))
    with pytest.raises(KeyboardInterrupt):
        evaluate_files(str(runs / "r"), **asked)
    assert (runs / "r" / "evaluate.partial.jsonl").is_file()
    rest = Stops(real)
    monkeypatch.setattr(quality, "token_nll", rest)
    assert evaluate_files(str(runs / "r"), **asked) == whole, "the same figures, to the last digit"
    assert rest.calls == 8 * 7 - 17
    assert not (runs / "r" / "evaluate.partial.jsonl").exists()


def test_evaluation_of_little_time_measures_fewer_tokens(runs, texts):
    asked = {"data": str(texts[1]), "tokens": 3072, "rates": (0.5,)}
    short, whole = (
        evaluate_files(str(runs / "r"), **asked, seconds=seconds) for seconds in (0.0, 1e9)
    )
    assert short["tokens"] == quality.FLOOR // 32 * 31 < whole["tokens"]
    first = evaluate_files(str(runs / "r"), **asked | {"tokens": quality.FLOOR})
    assert short | {"tokens_asked": 0} == first | {"tokens_asked": 0}, (
        "all figures are of the same tokens"
    )


def test_benchmark_keeps_its_rounds(runs, monkeypatch):
    asked = {"prompt_tokens": 24, "new_tokens": 4, "repeats": 3}
    real, steps = speed.generate, speed.train_step
    monkeypatch.setattr(
        speed, "generate", Stops(real, 6)
    )  # two warm, two rounds of concept, one of the base
    with pytest.raises(KeyboardInterrupt):
        benchmark_files(str(runs / "r"), **asked)
    before = {
        (part := json.loads(line))["key"]: part["value"]
        for line in (runs / "r" / "benchmark.partial.jsonl").read_text().splitlines()[1:]
        if line
    }
    trained, wrote = Stops(steps), Stops(real)
    monkeypatch.setattr(speed, "train_step", trained)
    monkeypatch.setattr(speed, "generate", wrote)
    found = benchmark_files(str(runs / "r"), **asked)
    assert (trained.calls, wrote.calls) == (0, 2 + 3), "what was timed is not timed again"
    assert found["concept"]["train_seconds"]["max"] == max(
        before[f"train concept {turn}"] for turn in range(3)
    )
    assert found["base"]["prefill_seconds"]["min"] == min(
        before[f"prefill base {turn}"] for turn in range(3)
    )
    assert found["cache_reduction"] > 0 and not (runs / "r" / "benchmark.partial.jsonl").exists()


def test_a_benchmark_stopped_behind_its_last_round_ends_alike(runs, monkeypatch):
    asked = {"prompt_tokens": 24, "new_tokens": 4, "repeats": 1, "training": False}
    whole = benchmark_files(str(runs / "r"), **asked)
    monkeypatch.setattr(speed, "cache_bytes", Stops(speed.cache_bytes, 1))
    with pytest.raises(KeyboardInterrupt):
        benchmark_files(str(runs / "r"), **asked)
    monkeypatch.undo()
    found = benchmark_files(str(runs / "r"), **asked)
    for key in ("cache_reduction", "realised_rate", "ceiling_decode_speedup"):
        assert found[key] == whole[key]


def test_benchmark_of_little_time_takes_one_round(runs, monkeypatch):
    wrote = Stops(speed.generate)
    monkeypatch.setattr(speed, "generate", wrote)
    found = benchmark_files(str(runs / "r"), 24, 4, repeats=5, training=False, seconds=0.0)
    assert wrote.calls == 4, "one round not counted and one counted, of both sides"
    assert (
        found["concept"]["generate_seconds"]["min"] == found["concept"]["generate_seconds"]["max"]
    )


def test_an_empty_cache_is_a_fault_and_no_division(runs, monkeypatch):
    monkeypatch.setattr(speed, "cache_bytes", lambda cache: 0)
    with pytest.raises(
        CheckpointError, match=r"the cache is empty after 28 tokens \(concept\): need .* try: "
    ):
        benchmark_files(str(runs / "r"), 24, 4, repeats=1, training=False)


def test_a_checkpoint_stands_behind_the_calibration(recipe_values, tmp_path):
    run({**recipe_values, "save_every": 100, "quantise": [0.3, 0.6]}, tmp_path / "r")
    first = next(line["step"] for line in metrics(tmp_path / "r") if line["quantise"] > 0)
    assert {p.name for p in (tmp_path / "r" / "checkpoints").iterdir()} == {
        f"checkpoint-{first}",
        "checkpoint-8",
    }


def test_bars_write_lines_where_there_is_no_terminal(capsys, monkeypatch):
    with (
        progress.bar(total=1, desc="outside"),
        progress.bar(total=10, desc="work", unit="part") as shown,
    ):
        progress.advance(shown, 4, reused=True)
        progress.advance(shown, 6, reused=False)
        assert (shown.n, shown.initial) == (10, 4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0] for line in lines] == [
        "outside:   0",
        "work:   0",
        "work: 100",
        "outside:   0",
    ]
    assert not {"\r", "\x1b"} & set("".join(lines))


def test_what_comes_once_tells_nothing_of_further_steps():
    """A calibration of ten minutes between steps of a second: 8 steps take 8 seconds more, not an
    hour."""
    with progress.bar(total=10, desc="train") as shown:
        now = [shown.start_t]
        shown._time = lambda: now[0]
        for calibration in (0.0, 600.0):
            now[0] += calibration + 1
            progress.leave_out(calibration)
            shown.update(1)
        known = shown.format_dict
    assert (known["rate"] or known["n"] / known["elapsed"]) == pytest.approx(1.0)
