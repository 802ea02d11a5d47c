"""The table of figures: what it says of a value, and that docs/figures.md is made of it."""

import math
from pathlib import Path

from sememe import figures
from sememe.figures import concept_name, figure, rows, show, table


def test_the_document_is_made_of_the_table():
    page = (Path(__file__).parents[1] / "docs" / "figures.md").read_text(encoding="utf-8")
    assert page == figures.document(), "run: python -m sememe.figures > docs/figures.md"


def test_a_value_is_shown_by_its_unit():
    for value, unit, shown in (
        (2.5, "nats", "2.5000"),
        (-0.1, "delta", "−0.1000"),
        (0.251, "share", "25.1 %"),
        (1.5, "ratio", "1.50×"),
        (1_234_567, "bytes", "1.23 MB"),
        (5123.4, "speed", "5,123 tokens/s"),
        (3725, "time", "1:02:05"),
        (0.0432, "delay", "43 ms"),
        (61.5, "delay", "0:01:02"),
        (65536, "count", "65,536"),
        ([21.123456, None], "", "21.12 · –"),
        (math.nan, "nats", "–"),
        ({"median": 2.0, "min": 1.5, "max": 4.0}, "time", "2.0 s (1.5 s–4.0 s)"),
        ("text", "nats", "text"),
    ):
        assert show(value, unit) == shown


def test_rows_and_tables_of_json():
    result = {"new": 7, "tokens": 9, "nll": 2.0, "dial": [{"nll": 1.0}], "settings": {"a": 1}}
    assert [row[:2] for row in rows(result)] == [("new", "7"), ("tokens", "9"), ("nll", "2.0000")]
    assert figure("new").meaning == "(no description in this version)"
    assert table(result["dial"]) == (["NLL"], [["1.0000"]])
    assert table([{"nll": 1.0}, {"rate": 0.5}], ["rate"]) == (["rate"], [["–"], ["50 %"]])


def test_a_healthy_range_is_read_off_its_own_words():
    assert figure("delta_nll_zero").is_healthy(0.05) is True
    assert figure("delta_nll_zero").is_healthy(0.04) is False
    assert figure("em_flips").is_healthy(0.5) is False
    assert figure("nll").is_healthy(3.0) is None and figure("em_flips").is_healthy(None) is None


def test_a_concept_is_named_by_its_codes():
    assert concept_name(5270661, 4096, 2) == "1286·3205"
    assert concept_name(1286, 4096, 1) == "1286"
    assert concept_name(7, 4096, 3) == "0·0·7"
