"""The page of a speed sweep: synthetic sweep.json in, plots and tables out."""

import json
import math

import pytest

from sememe.errors import CheckpointError
from sememe.report import write_speed
from sememe.report.speed import MOST_CURVES, is_speed, point_rows, read_speed, speed_plots
from test_report import HOSTILE, Seen


def point(rate=0.5, length=128, batch=1, speed=1.3, split="4/22/4", **more) -> dict:
    caches = {
        "concept": {"cache_bytes": 20 * length * batch * rate},
        "base": {"cache_bytes": 30 * length * batch},
    }
    return (
        {
            "split": split,
            "rate": rate,
            "prompt_tokens": length,
            "batch": batch,
            "fault": None,
            "decode_speedup": speed,
            "ceiling_decode_speedup": 2 - rate,
            "decode_speedup_range": [speed - 0.1, speed + 0.1],
        }
        | caches
        | more
    )


def write(folder, points, **more):
    found = {
        "kind": "speed",
        "model": "tiny",
        "base_name": "base",
        "settings": {"new_tokens": 64},
        "points": points,
        "alternatives": [],
    } | more
    (folder / "sweep.json").write_text(json.dumps(found))
    return folder


def test_plots_show_what_varies(tmp_path):
    grid = [
        point(rate, length, batch)
        for rate in (0.5, 0.25)
        for length in (128, 2048)
        for batch in (1, 4)
    ]
    ceiling, cache = speed_plots(read_speed(write(tmp_path, grid)))
    seen = Seen(ceiling.svg).text
    assert all(
        word in seen for word in ("prompt 2,048, batch 4", "the ceiling", "the base", "rate 0.25")
    )
    assert "4/22/4" not in seen, "one split needs no name"
    assert all(
        word in Seen(cache.svg).text for word in ("the base", "4/22/4 at 0.5", "4/22/4 at 0.25")
    )
    both = speed_plots(read_speed(write(tmp_path, [*grid, point(split="8/14/8")])))
    assert "8/14/8" in Seen(both[0].svg).text
    single = speed_plots(read_speed(write(tmp_path, grid[::2])))
    assert "batch" not in Seen(single[0].svg).text


def test_too_many_curves_are_counted(tmp_path):
    cache = speed_plots(
        read_speed(write(tmp_path, [point(1 / n) for n in range(1, MOST_CURVES + 4)]))
    )[1]
    assert cache.caption.endswith("Not drawn: 3 more.")


@pytest.mark.parametrize(
    "junk", [None, "text", [], {}, math.nan, True, [None, "x"], 10**400, 0, -1]
)
def test_unexpected_values_leave_a_page(tmp_path, junk):
    keys = [key for key in point() if key != "fault"]
    page = write_speed(
        write(
            tmp_path,
            [{key: junk for key in keys} | {"fault": None}, junk],
            alternatives=junk,
            settings=junk,
        )
    )
    assert "<html" in page.read_text()
    each = [point() | {key: junk} for key in keys]
    assert (
        "<svg"
        in write_speed(write(tmp_path, [point(), *each], alternatives=[{"name": junk}])).read_text()
    )


def test_text_of_the_file_is_shown_and_not_run(tmp_path):
    faults = [{"split": HOSTILE, "rate": 0.5, "prompt_tokens": 9, "batch": 1, "fault": HOSTILE}]
    folder = write(
        tmp_path,
        [point(split=HOSTILE), *faults],
        model=HOSTILE,
        settings={HOSTILE: HOSTILE},
        alternatives=[{"name": "llama.cpp", "fault": HOSTILE}, {"name": HOSTILE, "fault": None}],
    )
    page = Seen(write_speed(folder).read_text())
    assert "script" not in page.tags and "alert(" in page.text


def test_a_range_stands_behind_its_figure():
    (cells,) = point_rows([point()])
    assert "1.30× (1.20 to 1.40)" in cells
    assert "1.30×" in point_rows([point(decode_speedup_range=None)])[0]


def test_no_points_no_plots(tmp_path):
    page = Seen(write_speed(write(tmp_path, [])).read_text())
    assert "No point was measured." in page.text and "svg" not in page.tags


def test_what_is_no_speed_sweep_is_refused(tmp_path):
    assert not is_speed(tmp_path)
    with pytest.raises(CheckpointError, match="which is no speed sweep; need"):
        read_speed(tmp_path)
    assert is_speed(write(tmp_path, []))
