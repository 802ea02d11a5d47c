"""`make demo`: the whole path on bundled text, within minutes on two cores, resumable at every step."""

import time
from pathlib import Path

import torch
from rich.console import Console

from sememe.backbone.bases import resolve
from sememe.evaluation.figures import kept
from sememe.evaluation.files import benchmark_files, evaluate_files
from sememe.report import write_report
from sememe.show import generate_text
from sememe.tables import show_quality, show_speed
from sememe.training.recipe import Recipe, load_recipe
from sememe.training.run import precision, train

PROMPT = "The little priest looked at the locked door, and then he said quietly:"
BUDGET_S = 560  # of training, for both runs together; what follows takes about two minutes more
STEPS = (30, 140)
REST_S = 150


def run_demo(recipe_path: Path, runs: Path, out: Console) -> dict:
    """Pull, control, train, evaluate, generate, benchmark, report. What is there already is reused.

    Writes `runs/demo` and `runs/demo-control`; returns the figures and the report's path.
    """
    began = time.monotonic()
    run, control = runs / "demo", runs / "demo-control"
    if not (run / "recipe.yaml").is_file() and not (control / "recipe.yaml").is_file():
        out.print("timing this machine …")
    folder = resolve(load_recipe(recipe_path).base, say=out.print)
    steps, seconds = plan(load_recipe(recipe_path), folder, run, control)
    recipe = load_recipe(recipe_path, [f"steps={steps}"])
    reused = [str(p) for p in (run, control) if (p / "model" / "manifest.json").is_file()]
    left = "less than a minute" if seconds < 60 else f"about {round(seconds / 60)} minutes"
    out.print(
        f"{left} from here: {steps} steps of control and concept model each "
        f"({precision(recipe)}, {torch.get_num_threads()} threads)" + (f"; reusing {', '.join(reused)}" if reused else "")
    )
    train(load_recipe(recipe_path, [f"steps={steps}", "system=control"]), control, say=out.print)
    train(recipe, run, say=out.print)

    measured = {"data": recipe.data.heldout, "control": str(control)}
    figures = kept(run, "evaluate.json", target_rate=recipe.rate, **measured) or evaluate_files(str(run), tokens=8192, **measured)
    out.rule("generate")
    generate_text(str(run), PROMPT, 48, 0.7, 0.9, 0, True, out)
    speed = kept(run, "benchmark.json", settings={"target_rate": recipe.rate}) or benchmark_files(str(run), 256, 48, 1, 3)
    page = write_report(run, control)
    out.rule("result")
    show_quality(figures)
    show_speed(speed)
    out.print(f"done in {(time.monotonic() - began) / 60:.1f} minutes")
    out.print(f"report: {page}", soft_wrap=True)
    return {"report": str(page), "evaluate": figures, "benchmark": speed}


def plan(recipe: Recipe, folder: Path, run: Path, control: Path) -> tuple[int, float]:
    """(steps, seconds left): as many steps as fit the budget on this machine. A run already begun keeps its steps."""
    begun = [p for p in (control, run) if (p / "recipe.yaml").is_file()]
    left = [p for p in (control, run) if not (p / "model" / "manifest.json").is_file()]
    if begun and not left:
        return load_recipe(begun[0] / "recipe.yaml").steps, 20.0
    per_step = _step_seconds(recipe, folder)
    steps = load_recipe(begun[0] / "recipe.yaml").steps if begun else int(BUDGET_S / 2 / per_step)
    if not begun:
        steps = max(STEPS[0], min(STEPS[1], steps))
    return steps, len(left) * steps * per_step + REST_S


def _step_seconds(recipe: Recipe, folder: Path) -> float:
    """Seconds of a training step of the base with LoRA, measured on one short batch."""
    from sememe.models import ControlConfig, ControlForCausalLM

    model = ControlForCausalLM.from_base(ControlConfig(base=recipe.base, lora_rank=recipe.lora.rank), folder=folder)
    ids = torch.randint(3, model.config.text_config.vocab_size, (1, recipe.sequence_length))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision(recipe) == "bf16" and not torch.cuda.is_available()):
            model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        times.append(time.perf_counter() - start)
    return min(times) * recipe.batch_size
