"""Whether a run folder goes on with a recipe: by what base and texts hold, not by where they are;
and how it is made longer."""

import json
import os
from pathlib import Path
from typing import Any

from sememe import storage
from sememe.backbone.bases import fingerprint, resolve
from sememe.errors import RecipeError
from sememe.evaluation.inputs import INPUTS, record, recorded
from sememe.options import Recipe, flat, load_recipe
from sememe.paths import usable
from sememe.systems import SYSTEMS
from sememe.training.checkpoints import last_checkpoint, step_of
from sememe.training.trainer import cosine

CONTENTS = {
    "base": "base_sha256",
    "data.train": "train.sha256",
    "data.heldout": "heldout.sha256",
}
"""Keys that are compared by what they name → where inputs.json has its hash."""
FIGURES = ("evaluate.json", "ablate.json", "benchmark.json", "reconstruct.json")


def is_finished(run: Path) -> bool:
    return (run / "model" / "manifest.json").is_file()


def same_run(recipe: Recipe, run: Path) -> bool:
    """True where `run` is a finished run of this recipe; False where it is new, unfinished, or made
    longer by it. The same weights and texts at another place are the same recipe.

    Raises RecipeError where it holds another recipe, SememeError where it cannot be a path."""
    run = usable(run)
    if not (run / "recipe.yaml").is_file():
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise RecipeError(
                f"{run} is there and is no run folder: need an empty or new one. try: another --out"
            )
        return False
    held = load_recipe(run / "recipe.yaml")
    if held == recipe and is_finished(run):
        return True
    old, new = flat(held.model_dump()), flat(recipe.model_dump())
    before = flat(recorded(run))
    now = flat(record(run, fingerprint(resolve(recipe.base)), recipe.data.model_dump()))
    for key in old | new:
        if key in CONTENTS:
            same = before.get(CONTENTS[key]) == now[CONTENTS[key]]
        else:
            same = old.get(key) == new.get(key) or (key == "steps" and _may_grow(held, recipe, run))
        if not same:
            wanted = "what it holds now" if old.get(key) == new.get(key) else new.get(key)
            raise RecipeError(
                f"{run} holds a run with {key} = {old.get(key)}, not {wanted}: need the same "
                "recipe, and base and texts of the same content, to resume. try: another --out"
            )
    return is_finished(run) and held.steps == recipe.steps


def open_run(recipe: Recipe, run: Path, environment: dict[str, Any], base_sha256: str, say) -> None:
    """Writes what a run folder holds from the start. A finished model that is trained on moves to
    RUN/model-STEPS, its figures into it."""
    run.mkdir(parents=True, exist_ok=True)
    inputs = record(run, base_sha256, recipe.data.model_dump())
    inputs["lengthened"] = recorded(run).get("lengthened", [])
    checkpoint = last_checkpoint(run / "checkpoints", clean=False)
    old = load_recipe(run / "recipe.yaml").steps if checkpoint else recipe.steps
    if old != recipe.steps:
        step = step_of(checkpoint)
        inputs["lengthened"].append({"step": step, "steps": old})
        say(
            f"{run} is made longer, from {old} to {recipe.steps} steps: at step {step} the "
            f"learning rate goes from {cosine(step, old):.0%} of its peak to "
            f"{cosine(step, recipe.steps):.0%}; trained from the start, such a run comes out "
            "differently"
        )
        if is_finished(run):
            earlier = run / f"model-{old}"
            os.replace(run / "model", earlier)
            for path in (run / name for name in FIGURES):
                if path.is_file():
                    os.replace(path, earlier / path.name)
    storage.write(run / "env.json", json.dumps(environment, indent=2).encode())
    storage.write(run / INPUTS, json.dumps(inputs, indent=2).encode())
    storage.write(run / "recipe.yaml", recipe.yaml().encode())


def _may_grow(held: Recipe, recipe: Recipe, run: Path) -> bool:
    """Whether a run of `held` can be trained on to the steps of `recipe`. The learning rate may
    rise again; codes may not be taken back to states. Raises RecipeError where they would."""
    checkpoint = last_checkpoint(run / "checkpoints", clean=False)
    if recipe.steps < held.steps or checkpoint is None:
        return False
    step = step_of(checkpoint)
    system = SYSTEMS[recipe.system]
    if not system.lengthens:
        raise RecipeError(
            f"{run} is a planner, whose plans are of the pairs that its {held.steps} steps see: "
            f"need steps = {held.steps} to resume. try: another --out"
        )
    end = recipe.quantise[1] if system.writes_concepts else 0.0
    if end * (recipe.steps - 1) > step:
        max_steps = int(step / end) + 1
        raise RecipeError(
            f"{run} has {step} steps, and of steps = {recipe.steps} those are ahead of the end of "
            f"quantise, which would go back: need at most {max_steps} steps. try: "
            f"steps={max_steps}, or another --out"
        )
    return True
