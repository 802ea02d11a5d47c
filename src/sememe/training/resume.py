"""Whether a run folder holds a recipe: by what base and texts hold, not by where they are."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from sememe.backbone.bases import fingerprint, resolve
from sememe.errors import RecipeError
from sememe.evaluation.inputs import BASE_FILES, INPUTS, TEXTS, record, recorded
from sememe.keys import known_keys
from sememe.locks import LOCK
from sememe.options import Recipe, load_recipe
from sememe.paths import usable
from sememe.report.files import dig
from sememe.storage import check_manifest
from sememe.systems import SYSTEMS
from sememe.training.checkpoints import last_checkpoint, step_of


def is_finished(run: Path) -> bool:
    return (run / "model" / "manifest.json").is_file()


def same_run(recipe: Recipe, run: Path, force: Callable[[str], None] | None = None) -> bool:
    """True where `run` is a finished run of this recipe; False where it is new, unfinished, or to
    be made longer. The same weights and texts at another place are the same recipe. With `force`
    whatever differs is said, and no fault.

    Raises RecipeError where it holds another recipe, SememeError where it cannot be a path."""
    run = usable(run)
    if not (run / "recipe.yaml").is_file():
        if run.exists() and not (run.is_dir() and _is_empty(run)):
            raise RecipeError(
                f"{run} is there and is no run folder: need an empty or new one. try: another --out"
            )
        return False
    check_manifest(run, required=False)
    held = load_recipe(run / "recipe.yaml")
    if held == recipe and is_finished(run):  # whatever became of its base and texts
        return True
    base = resolve(recipe.base)
    now = record(run, base, fingerprint(base), recipe)
    before, after = _identity(held, recorded(run)), _identity(recipe, now)
    unknown = {name for name in BASE_FILES if before[name] is None}  # a run of an earlier version
    for key in (key for key in before if before[key] != after[key] and key not in unknown):
        if key == "steps" and _can_grow(held, recipe, run):
            continue
        # The configuration and the tokenizer of a base have no key of their own.
        old, new = map(attrgetter("base" if key in BASE_FILES else key), (held, recipe))
        wanted = "what it holds now" if old == new else new
        fault = f"{run} holds a run with {key} = {old}, not {wanted}"
        if force is None:
            raise RecipeError(
                f"{fault}: need the same recipe, and base and texts of the same content, to "
                "resume. try: another --out, or --force"
            )
        force(f"forced: {fault}")
    return is_finished(run) and held.steps == recipe.steps


def _is_empty(folder: Path) -> bool:
    """But for what a start that was killed may have left."""
    ours = ("env.json", INPUTS, LOCK)
    return all(path.name in ours or path.suffix == ".tmp" for path in folder.iterdir())


def _can_grow(held: Recipe, recipe: Recipe, run: Path) -> bool:
    """Whether a run can be trained on to more steps, from its last checkpoint. Not where codes
    would be taken back to states, or where the plans are of the pairs that its steps see."""
    system, checkpoint = SYSTEMS[recipe.system], last_checkpoint(run / "checkpoints")
    if checkpoint is None or recipe.steps < held.steps or not system.lengthens:
        return False
    all_codes = 0.0 if "quantise" in system.unread else recipe.quantise[1]
    return all_codes * (recipe.steps - 1) <= step_of(checkpoint)


def _identity(recipe: Recipe, inputs: dict) -> dict:
    """The value of every key; of base and texts what they hold."""
    values = {key: attrgetter(key)(recipe) for key in known_keys()}
    texts = {f"data.{name}": dig(inputs, f"{name}.sha256") for name in TEXTS}
    base = {"base": inputs.get("base_sha256"), **{name: inputs.get(name) for name in BASE_FILES}}
    return values | texts | base
