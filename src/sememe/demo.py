"""`make demo`: the whole path on bundled text, within twenty minutes on two cores, busy ones too;
resumable in every stage."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from sememe.backbone.bases import load_tokenizer, resolve
from sememe.console import say
from sememe.errors import Interrupted
from sememe.evaluation.figures import kept, put
from sememe.evaluation.files import benchmark_files, evaluate_files
from sememe.progress import bar
from sememe.report import write_report
from sememe.show import generate_text
from sememe.tables import show_quality, show_speed
from sememe.training.build import build_blocks, build_model
from sememe.training.checkpoints import last_checkpoint, step_of
from sememe.training.recipe import Recipe, load_recipe
from sememe.training.run import precision, train

PROMPT = "The little priest looked at the locked door, and then he said quietly:"
LIMIT_S = 20 * 60
PLAN_S = 12 * 60  # at the speed that was timed; the rest is for a machine that gets slower
STEPS = (6, 140)
TOKENS, REPEATS = 8192, 3  # of evaluation and benchmark, where there is time
# What the last stages take, in training steps: all of it, and at the least.
EVALUATE, BENCHMARK, SAMPLE = (14.0, 4.0), (8.0, 4.0), 1.5
STAGES = (
    "base",
    "timing",
    "control",
    "concept model",
    "evaluation",
    "sample",
    "benchmark",
    "report",
)


class Clock:
    """Which stage it is, and how long the rest will take: the estimates, as far off as the last
    long stage was."""

    def __init__(self, out: Console):
        self.out, self.began, self.pace = out, time.monotonic(), 1.0
        self.estimates: dict[str, float] = {}

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def left(self, *without: str) -> float:
        return self.pace * sum(
            seconds for name, seconds in self.estimates.items() if name not in without
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        say(
            f"stage {STAGES.index(name) + 1} of {len(STAGES)}{self._left()} · {name}",
            console=self.out,
        )
        start = time.monotonic()
        yield
        expected = self.estimates.pop(name, 0.0)
        if expected > 30:
            self.pace = min(5.0, max(0.5, (time.monotonic() - start) / expected))

    def _left(self) -> str:
        if not self.estimates:
            return ""
        minutes = round(self.left() / 60)
        return (
            f" · about {minutes} minute{'s' * (minutes != 1)} left"
            if minutes
            else " · less than a minute left"
        )


def run_demo(recipe_path: Path, runs: Path, out: Console) -> dict:
    """Pull, time, control, train, evaluate, generate, benchmark, report. What is there already is
    reused.

    Writes `runs/demo` and `runs/demo-control`; returns the figures and the report's path. Raises
    Interrupted on Ctrl-C: the same call goes on from there."""
    try:
        return _run(recipe_path, runs, out, Clock(out))
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped; the same command goes on from there") from stop


def _run(recipe_path: Path, runs: Path, out: Console, clock: Clock) -> dict:
    run, control = runs / "demo", runs / "demo-control"
    threads = torch.get_num_threads()
    with clock.stage("base"):
        folder = resolve(load_recipe(recipe_path).base, say=partial(say, console=out))
    with clock.stage("timing"):
        plan = plan_for(recipe_path, folder, run, control, runs / "demo-plan.json")
        torch.set_num_threads(plan["threads"])
    try:
        return _measure(recipe_path, run, control, out, clock, plan)
    finally:
        torch.set_num_threads(threads)


def _measure(
    recipe_path: Path, run: Path, control: Path, out: Console, clock: Clock, plan: dict
) -> dict:
    words, step_s = (
        [f"{key}={plan[key]}" for key in ("steps", "calibration_tokens")],
        plan["step_seconds"],
    )
    recipe = load_recipe(recipe_path, words)
    reused = [str(p) for p in (control, run) if (p / "model" / "manifest.json").is_file()]
    asked = {"data": recipe.data.heldout, "control": str(control)}
    figures = kept(run, "evaluate.json", target_rate=recipe.rate, **asked)
    speed = kept(run, "benchmark.json", settings={"target_rate": recipe.rate})
    at = {p: plan["steps"] if str(p) in reused else _steps_done(p) for p in (control, run)}
    calibration = 0.0 if at[run] else plan["calibration_seconds"]
    clock.estimates = {
        "control": (plan["steps"] - at[control]) * step_s,
        "concept model": (plan["steps"] - at[run]) * step_s + calibration,
        "evaluation": 0.0 if figures else plan["evaluate_seconds"],
        "sample": SAMPLE * step_s + 5,
        "benchmark": 0.0 if speed else plan["benchmark_seconds"] + 15,
        "report": 3.0,
    }
    say(
        f"{plan['steps']} steps of {step_s:.0f} s for control and concept model each "
        f"({precision(recipe)}, "
        f"{plan['threads']} threads), about {(clock.spent + clock.left()) / 60:.0f} minutes in all"
        + (f"; reusing {', '.join(reused)}" if reused else ""),
        console=out,
    )
    with clock.stage("control"):
        train(
            load_recipe(recipe_path, [*words, "system=control"]),
            control,
            say=partial(say, console=out),
        )
    with clock.stage("concept model"):
        train(recipe, run, say=partial(say, console=out))
    with clock.stage("evaluation"):
        figures = figures or evaluate_files(
            str(run), tokens=TOKENS, seconds=_share(clock, "evaluation"), **asked
        )
    with clock.stage("sample"):
        generate_text(str(run), PROMPT, 48, 0.7, 0.9, 0, True, out)
    with clock.stage("benchmark"):
        speed = speed or benchmark_files(
            str(run), 256, 48, 1, REPEATS, seconds=_share(clock, "benchmark")
        )
    with clock.stage("report"):
        page = write_report(run, control)
    out.rule("result")
    show_quality(figures)
    show_speed(speed)
    say(f"done in {clock.spent / 60:.1f} minutes", console=out)
    say(f"report: {page}", console=out)
    return {"report": str(page), "evaluate": figures, "benchmark": speed}


def _steps_done(run: Path) -> int:
    checkpoint = last_checkpoint(run / "checkpoints", clean=False)
    return step_of(checkpoint) if checkpoint else 0


def _share(clock: Clock, name: str) -> float:
    """Seconds that a stage may take so that the limit holds. It is what gives where the machine has
    become slower."""
    return max(clock.estimates[name] / 2, LIMIT_S - clock.spent - clock.left(name))


def plan_for(recipe_path: Path, folder: Path, run: Path, control: Path, file: Path) -> dict:
    """Steps, calibration tokens and threads, and what was timed. Runs already begun keep theirs."""
    begun = [p for p in (control, run) if (p / "recipe.yaml").is_file()]
    if begun and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    recipe = load_recipe(begun[0] / "recipe.yaml" if begun else recipe_path)
    plan = choose(recipe, **time_machine(recipe, folder))
    if begun:
        plan |= {"steps": recipe.steps, "calibration_tokens": recipe.calibration_tokens}
    file.parent.mkdir(parents=True, exist_ok=True)
    put(file, plan)
    return plan


def choose(recipe: Recipe, step_seconds: float, calibration_seconds: float, threads: int) -> dict:
    """What fits `PLAN_S`: calibration at most a sixth of it, then what the last stages need, then
    steps."""
    tokens, least = (
        recipe.calibration_tokens,
        min(recipe.calibration_tokens, 16 * recipe.sequence_length),
    )
    while tokens // 2 >= least and calibration_seconds > PLAN_S / 6:
        tokens, calibration_seconds = tokens // 2, calibration_seconds / 2
    rest = PLAN_S - calibration_seconds - SAMPLE * step_seconds
    need, floor = (step_seconds * (EVALUATE[i] + BENCHMARK[i]) for i in (0, 1))
    last = max(floor, min(need, rest / 3))
    evaluate = last * EVALUATE[0] / (EVALUATE[0] + BENCHMARK[0])
    steps = max(STEPS[0], min(STEPS[1], int((rest - last) / (2 * step_seconds))))
    return {
        "steps": steps,
        "calibration_tokens": tokens,
        "threads": threads,
        "step_seconds": step_seconds,
        "calibration_seconds": calibration_seconds,
        "evaluate_seconds": evaluate,
        "benchmark_seconds": last - evaluate,
    }


def time_machine(recipe: Recipe, folder: Path) -> dict:
    """Seconds of a training step of the concept model and of its calibration, and the number of
    threads that is fastest.

    On a busy machine fewer threads are often faster: all of them wait for the one that is kept from
    its core."""
    ids_NT, _ = build_blocks(recipe, load_tokenizer(folder))
    model, some = build_model(recipe, folder), min(4, len(ids_NT))

    def step(batch: int) -> float:
        start = time.perf_counter()
        with torch.autocast(
            "cpu",
            torch.bfloat16,
            enabled=precision(recipe) == "bf16" and not torch.cuda.is_available(),
        ):
            model.train()(
                input_ids=ids_NT[:batch], labels=ids_NT[:batch], use_cache=False
            ).loss.backward()
        return (time.perf_counter() - start) * recipe.batch_size / batch

    choices = sorted({1, torch.get_num_threads()})
    with bar(total=2 + 3 * len(choices), desc="timing", unit="part") as shown:
        start = time.perf_counter()
        model.start_frame(ids_NT[:some], recipe.rate)
        shown.update()
        model.config.rate, model.config.quantise = recipe.rate, 1.0
        model.start_codes(ids_NT[:some], recipe.seed)
        shown.update()
        calibration = (
            (time.perf_counter() - start)
            * recipe.calibration_tokens
            / (some * recipe.sequence_length)
        )
        times: dict[int, list[float]] = {threads: [] for threads in choices}
        step(1)  # what is made once
        for _ in range(2):
            for threads in choices:
                torch.set_num_threads(threads)
                times[threads].append(step(1))
                shown.update()
        threads = min(choices, key=lambda n: max(times[n]))
        torch.set_num_threads(threads)
        whole = step(recipe.batch_size)
        shown.update(len(choices))
    # Of two timings the slower: a guess that was too long leaves time over, one too short breaks
    # the limit.
    return {
        "step_seconds": max(whole, min(times[threads])),
        "calibration_seconds": calibration,
        "threads": threads,
    }
