"""A task that a plan solves, and a tiny planner's recipe for it: the source names one of a few
sentences, the target is it."""

import json
from pathlib import Path

from conftest import tiny_recipe

SAID = {
    "aa": "the cat sat on a mat",
    "bb": "dogs dig up old bones",
    "cc": "we sail at first light",
    "dd": "no fish in this lake",
}


def write_pairs(folder: Path) -> tuple[Path, Path]:
    """(train, heldout): the same four sentences, asked for in other words."""
    forms = {
        "train": ("say {}", "{}!", "now {}", "{} please", "give {}"),
        "heldout": ("I want {}", "{} now"),
    }
    for name, asked in forms.items():
        pairs = [(form.format(key), said) for form in asked for key, said in SAID.items()]
        lines = (json.dumps({"instruction": u, "response": y}) + "\n" for u, y in pairs)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder / "train.jsonl", folder / "heldout.jsonl"


def planner_recipe(base: Path, files: tuple[Path, Path]) -> dict:
    """A few seconds of training."""
    values = tiny_recipe(base, files) | {"system": "planner", "batch_size": 4}
    values |= {"source_length": 12, "target_length": 24}
    values["data"]["fields"] = ["instruction", "response"]
    values["plan"] = {"sizes": [4, 6], "lengths": [1, 2]}
    values["em"] = {"every": 2, "stages": [0.25, 0.5], "batch": 16}
    values["em"]["proposers"] = {"beam": 2, "sample": 1, "edit": 2}
    return values
