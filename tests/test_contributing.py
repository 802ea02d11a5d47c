"""The examples of CONTRIBUTING.md work, and are short."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from families import text, tiny_online
from sememe import figures
from sememe.concepts import boundary, head

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.S)
KINDS = ("boundary", "code", "instrument", "figure", "rule")


@pytest.mark.parametrize(("kind", "example"), zip(KINDS, EXAMPLES, strict=True))
def test_examples_work(kind, example, monkeypatch):
    # The tables are as they were when a test ends.
    monkeypatch.setitem(boundary.BOUNDARIES, "norm", None)
    monkeypatch.setitem(head.HEADS, "cosine", None)
    monkeypatch.setitem(figures.FIGURES, "sink_rate", figures.Figure("sink_rate", "sink_rate"))
    assert len(example.strip().splitlines()) <= 15
    names: dict = {}
    exec(example, names)
    if kind == "boundary":  # under a name that keys.py has: a new one is a line there
        monkeypatch.setitem(boundary.BOUNDARIES, "null", boundary.BOUNDARIES["norm"])
        assert (tiny_online(boundary="null")(text()).concept_ids >= 0).any()
    elif kind == "code":
        monkeypatch.setitem(head.HEADS, "nearest", head.HEADS["cosine"])
        assert (tiny_online(head="nearest")(text()).concept_ids >= 0).any()
    elif kind == "instrument":
        meter = names["SinkMeter"](16, 2)
        meter.see(SimpleNamespace(concept_ids=torch.tensor([[-2, 3, -1, 7]])), None)
        assert meter.read()["sink_rate"] == 0.25
    elif kind == "figure":
        shown = next(figures.rows({"sink_rate": 0.25}))
        assert shown == ("sink_rate", "25 %", "states without a code")
    else:
        assert names["rule"].is_sick({"heldout_nll.late": 5.0, "loss.late": 3.0}.get)
