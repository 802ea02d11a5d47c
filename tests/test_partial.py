"""Progress bars, and the checkpoint after calibration."""

import pytest

from conftest import metrics, run
from sememe import progress


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
        shown.update(10)
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
