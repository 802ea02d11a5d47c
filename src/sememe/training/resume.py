"""Whether a run folder goes on with a recipe: by what base and texts hold, not by where they are;
and how it is made longer."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from sememe import storage
from sememe.backbone.bases import fingerprint, resolve
from sememe.errors import BaseError, RecipeError
from sememe.evaluation.inputs import INPUTS, TEXTS, content, record, recorded
from sememe.options import Recipe, flat, read_recipe
from sememe.paths import usable
from sememe.systems import SYSTEMS
from sememe.training.checkpoints import last_checkpoint, step_of
from sememe.training.trainer import cosine

FIGURES = ("evaluate.json", "ablate.json", "benchmark.json", "reconstruct.json")


def same_run(recipe: Recipe, run: Path) -> bool:
    """True where `run` is a finished run of this recipe; False where it is new, unfinished, or made
    longer by it.

    Raises RecipeError where it holds another recipe, SememeError where it cannot be a path. The
    same weights and texts at another place are the same recipe."""
    run = usable(run)
    if not (run / "recipe.yaml").is_file():
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise RecipeError(
                f"{run} is there and is no run folder: need an empty or new one. try: another --out"
            )
        return False
    held, finished = read_recipe(run / "recipe.yaml"), (run / "model" / "manifest.json").is_file()
    if held == recipe and finished:
        return True
    a, b = (flat(one.model_dump()) for one in (held, recipe))
    different = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    texts = tuple(f"data.{name}" for name in TEXTS)
    begun = finished or last_checkpoint(run / "checkpoints", clean=False) is not None
    for key in dict.fromkeys(
        (*different, *(texts if begun else ()))
    ):  # a text may have changed under its name
        if key == "base":
            same = _same_base(held, recipe, run)
        elif key in texts:
            same = _same_text(key.removeprefix("data."), a[key], b[key], run)
        else:
            same = key == "steps" and _may_grow(held, recipe, run)
        if not same:
            other = f"not {b.get(key)}" if key in different else "which was changed since"
            what = "content at any place" if key in ("base", *texts) else "recipe"
            raise RecipeError(
                f"{run} holds a run with {key} = {a.get(key)}, {other}: need the same {what} to "
                "resume. "
                "try: another --out"
            )
    return finished and "steps" not in different


def open_run(
    recipe: Recipe,
    run: Path,
    environment: dict[str, Any],
    base_sha256: str,
    checkpoint: Path | None,
    say,
) -> None:
    """Writes what a run folder holds from the start, and says what is not as it was when the run
    was begun.

    A finished model that is trained on moves to RUN/model-STEPS, its figures into it. Raises
    RecipeError where the weights of the base have changed."""
    run.mkdir(parents=True, exist_ok=True)
    before, inputs = recorded(run), record(run, base_sha256, recipe.data.model_dump())
    if before.get("base_sha256", base_sha256) != base_sha256 and checkpoint is not None:
        raise RecipeError(
            f"{run} was begun on a base with sha256 {before['base_sha256'][:12]}…, and "
            f"{recipe.base} has "
            f"{base_sha256[:12]}… now: need the same weights to resume. try: another --out"
        )
    inputs["lengthened"] = before.get("lengthened", [])
    if checkpoint is not None and (held := read_recipe(run / "recipe.yaml")) != recipe:
        for key, old, new in (
            ("base", held.base, recipe.base),
            *(
                (f"data.{name}", getattr(held.data, name), getattr(recipe.data, name))
                for name in TEXTS
            ),
        ):
            if old != new:
                say(f"{key} is {new} now, and was {old}: it holds the same")
        if held.steps != recipe.steps:
            step = step_of(checkpoint)
            inputs["lengthened"] = [*inputs["lengthened"], {"step": step, "steps": held.steps}]
            was, now = (cosine(step, one.steps) for one in (held, recipe))
            say(
                f"{run} is made longer, from {held.steps} to {recipe.steps} steps: at step {step} "
                "the learning rate goes from "
                f"{was:.0%} of its peak to {now:.0%}, where a run of {recipe.steps} steps has it; "
                "trained from the start, such a "
                "run comes out differently"
            )
            if (run / "model" / "manifest.json").is_file():
                os.replace(run / "model", run / f"model-{held.steps}")
                for name in FIGURES:  # of that model
                    if (run / name).is_file():
                        os.replace(run / name, run / f"model-{held.steps}" / name)
    for name, text in (
        ("env.json", json.dumps(environment, indent=2)),
        ("recipe.yaml", recipe.yaml()),
        (INPUTS, json.dumps(inputs, indent=2)),
    ):
        storage.write(run / name, text.encode())


def _same_base(held: Recipe, recipe: Recipe, run: Path) -> bool:
    known = recorded(run).get("base_sha256") or _saved_base(run)
    try:
        return _fingerprint(resolve(recipe.base)) == (known or _fingerprint(resolve(held.base)))
    except BaseError:
        return False


def _saved_base(run: Path) -> str | None:
    """The hash that a run of an earlier version left with its weights."""
    checkpoint = last_checkpoint(run / "checkpoints", clean=False)
    for folder in (run / "model", *([] if checkpoint is None else [checkpoint])):
        if (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
                "base_sha256"
            )
    return None


@lru_cache
def _fingerprint(folder: Path) -> str:
    return fingerprint(folder)


def _same_text(name: str, held: str, asked: str, run: Path) -> bool:
    before = recorded(run).get(name) or content(held)
    return before["sha256"] == content(asked)["sha256"]


def _may_grow(held: Recipe, recipe: Recipe, run: Path) -> bool:
    """Whether a run of `held` can be trained on to the steps of `recipe`.

    The learning rate may rise again; ramps from base to concepts may not be gone back on. Raises
    RecipeError where they would."""
    checkpoint = last_checkpoint(run / "checkpoints", clean=False)
    if recipe.steps < held.steps or checkpoint is None:
        return False
    step = step_of(checkpoint)
    system = SYSTEMS[recipe.system]
    if not system.lengthens:
        raise RecipeError(
            f"{run} is a planner, whose plans are of the pairs that its {held.steps} steps see: "
            "need steps = "
            f"{held.steps} to resume. try: another --out with steps={recipe.steps}, from the start"
        )
    end = recipe.quantise[1] if system.ramps else 0.0
    if end * (recipe.steps - 1) > step:
        longest = int(step / end) + 1
        raise RecipeError(
            f"{run} has {step} steps, and of steps = {recipe.steps} those are ahead of the end of "
            f"quantise, which would go back: need at most {longest} steps. try: "
            f"steps={longest}, or another "
            "--out with "
            f"steps={recipe.steps}, from the start"
        )
    return True
