"""Whether a run folder goes on with a recipe: by what base and texts hold, not by where they are;
and how it is made longer."""

import json
import os
from pathlib import Path
from typing import Any

from sememe import storage
from sememe.backbone.bases import fingerprint, resolve
from sememe.errors import BaseError, RecipeError
from sememe.evaluation.inputs import INPUTS, record, recorded
from sememe.options import Recipe, flat, read_recipe
from sememe.paths import source_sha256, usable
from sememe.systems import SYSTEMS
from sememe.training.checkpoints import last_checkpoint, step_of
from sememe.training.trainer import cosine

CONTENTS = ("base", "data.train", "data.heldout")
"""Keys that are compared by what they name."""
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
    held = read_recipe(run / "recipe.yaml")
    if held == recipe and is_finished(run):
        return True
    begun = is_finished(run) or last_checkpoint(run / "checkpoints", clean=False) is not None
    old, new = flat(held.model_dump()), flat(recipe.model_dump())
    for key in old | new:
        a, b = old.get(key), new.get(key)
        # A text may have changed under its name; a base is checked when it is loaded.
        if a == b and not (begun and key.startswith("data.") and key in CONTENTS):
            continue
        if key in CONTENTS:
            same, needed = _same_content(run, key, a, b), "content at any place"
        else:
            same, needed = key == "steps" and _may_grow(held, recipe, run), "recipe"
        if not same:
            other = "which was changed since" if a == b else f"not {b}"
            raise RecipeError(
                f"{run} holds a run with {key} = {a}, {other}: need the same {needed} to resume. "
                "try: another --out"
            )
    return is_finished(run) and held.steps == recipe.steps


def open_run(recipe: Recipe, run: Path, environment: dict[str, Any], base_sha256: str, say) -> None:
    """Writes what a run folder holds from the start, and says what is not as it was when the run
    was begun. Raises RecipeError where the weights of the base have changed."""
    run.mkdir(parents=True, exist_ok=True)
    before = recorded(run)
    inputs = record(run, base_sha256, recipe.data.model_dump())
    inputs["lengthened"] = before.get("lengthened", [])
    checkpoint = last_checkpoint(run / "checkpoints", clean=False)
    if checkpoint is not None:
        if before.get("base_sha256", base_sha256) != base_sha256:
            raise RecipeError(
                f"{run} was begun on a base with sha256 {before['base_sha256'][:12]}…, and "
                f"{recipe.base} has {base_sha256[:12]}… now: need the same weights to resume. "
                "try: another --out"
            )
        held = read_recipe(run / "recipe.yaml")
        old, new = flat(held.model_dump()), flat(recipe.model_dump())
        for key in CONTENTS:
            if old[key] != new[key]:
                say(f"{key} is {new[key]} now, and was {old[key]}: it holds the same")
        if held.steps != recipe.steps:
            inputs["lengthened"].append({"step": step_of(checkpoint), "steps": held.steps})
            _lengthen(run, held.steps, recipe.steps, step_of(checkpoint), say)
    storage.write(run / "env.json", json.dumps(environment, indent=2).encode())
    storage.write(run / "recipe.yaml", recipe.yaml().encode())
    storage.write(run / INPUTS, json.dumps(inputs, indent=2).encode())


def _lengthen(run: Path, old: int, new: int, step: int, say) -> None:
    """A finished model that is trained on moves to RUN/model-STEPS, its figures into it."""
    say(
        f"{run} is made longer, from {old} to {new} steps: at step {step} the learning rate goes "
        f"from {cosine(step, old):.0%} of its peak to {cosine(step, new):.0%}, where a run of "
        f"{new} steps has it; trained from the start, such a run comes out differently"
    )
    if is_finished(run):
        earlier = run / f"model-{old}"
        os.replace(run / "model", earlier)
        for name in FIGURES:
            if (run / name).is_file():
                os.replace(run / name, earlier / name)


def _same_content(run: Path, key: str, old: str, new: str) -> bool:
    inputs = recorded(run)
    try:
        if key == "base":
            before = inputs.get("base_sha256") or fingerprint(resolve(old))
            return before == fingerprint(resolve(new))
        text = inputs.get(key.removeprefix("data."), {})
        return (text.get("sha256") or source_sha256(old)) == source_sha256(new)
    except BaseError:
        return False


def _may_grow(held: Recipe, recipe: Recipe, run: Path) -> bool:
    """Whether a run of `held` can be trained on to the steps of `recipe`. The learning rate may
    rise again; codes may not be taken back to states. Raises RecipeError where they would."""
    checkpoint = last_checkpoint(run / "checkpoints", clean=False)
    if recipe.steps < held.steps or checkpoint is None:
        return False
    step = step_of(checkpoint)
    system = SYSTEMS[recipe.system]
    again = f"another --out with steps={recipe.steps}, from the start"
    if not system.lengthens:
        raise RecipeError(
            f"{run} is a planner, whose plans are of the pairs that its {held.steps} steps see: "
            f"need steps = {held.steps} to resume. try: {again}"
        )
    end = recipe.quantise[1] if system.writes_concepts else 0.0
    if end * (recipe.steps - 1) > step:
        max_steps = int(step / end) + 1
        raise RecipeError(
            f"{run} has {step} steps, and of steps = {recipe.steps} those are ahead of the end of "
            f"quantise, which would go back: need at most {max_steps} steps. try: "
            f"steps={max_steps}, or {again}"
        )
    return True
