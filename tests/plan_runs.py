"""A task that a plan solves, and a tiny planner's recipe for it: the source names one of a few
sentences, the target is it."""

import json
from pathlib import Path

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
    train, heldout = map(str, files)
    proposers = {"beam": 2, "sample": 1, "edit": 2}
    return {
        "system": "planner",
        "base": str(base),
        "steps": 8,
        "batch_size": 4,
        "source_length": 12,
        "target_length": 24,
        "data": {"train": train, "heldout": heldout, "fields": ["instruction", "response"]},
        "plan": {"sizes": [4, 6], "lengths": [1, 2]},
        "em": {"every": 2, "proposers": proposers, "stages": [0.25, 0.5], "batch": 16},
        "precision": "fp32",
        "lora": {"rank": 4, "dropout": 0.1},
        "heldout_every": 4,
        "heldout_tokens": 64,
        "save_every": 4,
    }
