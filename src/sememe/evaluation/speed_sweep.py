"""Speed over a grid: prompt length × batch × rate × split, each point beside the unmodified base;
and what a user would otherwise pick (`alternatives`). OUT/sweep.json is written after every point,
and what stands in it is not timed again."""

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sememe import storage
from sememe.data import read_texts
from sememe.errors import DataError, RecipeError, SememeError
from sememe.evaluation import alternatives
from sememe.evaluation.figures import put, run_recipe
from sememe.evaluation.files import prompts, torch_dtype
from sememe.evaluation.memory import free_bytes, needed_bytes, out_of_memory, peak_bytes, reset_peak
from sememe.evaluation.speed import benchmark_use, unclear
from sememe.evaluation.speed_models import Bench, Split, Subject, find_subject
from sememe.models.configuration import check_split, default_split
from sememe.models.loading import check_length, set_rate
from sememe.models.online import OnlineForCausalLM

FILE, KIND = "sweep.json", "speed"
UNTRAINED = "untrained, one every 1 / rate tokens"
RATES = (0.5, 0.25, 0.125)
KEYS = ("split", "rate", "prompt_tokens", "batch")  # what names a point
ROUNDS = 4  # runs in a round: prefill and generate, of both sides


@dataclass(frozen=True)
class Grid:
    """What varies. No `rates`: those of RATES that the model holds. No `splits`: the model's own,
    or a recipe's default."""

    prompt_lengths: tuple[int, ...] = (128, 512, 2048)
    batches: tuple[int, ...] = (1,)
    rates: tuple[float, ...] = ()
    splits: tuple[Split, ...] = ()


@dataclass(frozen=True)
class Point:
    split: Split
    rate: float
    prompt_tokens: int
    batch: int

    @property
    def keys(self) -> dict[str, Any]:
        return asdict(self) | {"split": "/".join(map(str, self.split))}

    def __str__(self) -> str:
        split, rate, length, batch = self.keys.values()
        return f"{split} at {rate:g}, prompt {length}, batch {batch}"


def parse_grid(
    prompt_lengths: str = "", batches: str = "", rates: str = "", splits: str = ""
) -> Grid:
    """`128,512`, `1,4`, `0.5,0.25`, `4/22/4,8/14/8`; what is empty keeps its default. Raises
    RecipeError for bad lists."""
    whole, share, layers = (
        "whole numbers from {} on",
        "concepts per token in (0, 1]",
        "shallow/middle/deep layers",
    )
    given = {
        "prompt_lengths": _listed(
            prompt_lengths, "--prompt-lengths", int, lambda n: n >= 2, whole.format(2), "128,512"
        ),
        "batches": _listed(batches, "--batches", int, lambda n: n >= 1, whole.format(1), "1,4"),
        "rates": _listed(rates, "--rates", float, lambda r: 0 < r <= 1, share, "0.5,0.25"),
        "splits": _listed(
            splits, "--splits", _split, lambda s: len(s) == 3, layers, "4/22/4,8/14/8"
        ),
    }
    return Grid(**{key: values for key, values in given.items() if values})


def _listed(
    text: str,
    option: str,
    read: Callable[[str], Any],
    holds: Callable[[Any], bool],
    need: str,
    example: str,
) -> tuple:
    """The values between the commas, each once."""
    if not text.strip():
        return ()
    try:
        values = tuple(dict.fromkeys(read(word.strip()) for word in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(map(holds, values)):
        raise RecipeError(
            f"{option} {text!r}: need {need}, with commas between. try: {option} {example}"
        )
    return values


def _split(word: str) -> tuple[int, ...]:
    return tuple(int(part) for part in word.split("/"))


def fill(grid: Grid, subject: Subject) -> Grid:
    """The grid with what it leaves open. Raises RecipeError for a split that does not fit the base,
    or a rate that the model cannot hold."""
    own = default_split(subject.layers) if subject.config is None else tuple(subject.config.split)
    for split in grid.splits:
        try:
            check_split(split, subject.layers)
        except RecipeError as error:
            said, other = (
                str(error).split(". try:")[0],
                "/".join(map(str, default_split(subject.layers))),
            )
            raise RecipeError(
                f"--splits {'/'.join(map(str, split))}: {said}. try: --splits {other}"
            ) from error
    rates = grid.rates or RATES
    if subject.config is not None and not grid.splits:  # an untrained one gets a max_tail that fits
        if not grid.rates:
            rates = tuple(r for r in RATES if r * (subject.config.max_tail + 1) >= 1) or (
                subject.config.rate,
            )
        for rate in rates:
            _check_rate(subject, rate)
    return replace(grid, rates=rates, splits=grid.splits or (own,))


def _check_rate(subject: Subject, rate: float) -> None:
    try:
        set_rate(copy.copy(subject.config), rate, subject.model)
    except RecipeError as error:  # it knows of one rate alone
        raise RecipeError(str(error).replace("try: --rate ", "try: --rates ")) from error


def place_for(model: str) -> Path:
    """Where the figures of `model` go if nothing else is said: its folder where it is a run, else
    one of their own."""
    return Path(model) if run_recipe(model) else Path("benchmark-sweep")


def sweep_speed(
    model: str,
    out: Path,
    grid: Grid | None = None,
    new_tokens: int = 64,
    repeats: int = 3,
    dtype: str = "float32",
    data: str | None = None,
    base: str | None = None,
    say: Callable[[str], None] = print,
    show: bool = True,
) -> dict[str, Any]:
    """Times every point of a grid that OUT/sweep.json does not hold yet; returns what it then
    holds.

    A saved model is timed as trained. A plain base, or any model where `grid.splits` are given,
    stands for untrained models over that base, with a concept every 1 / rate tokens. A point that
    does not fit is reported in its `fault`.

    Args:
        data: text for the prompts; default: the run's held-out text, or random tokens.

    Raises:
        RecipeError: a split or rate that does not fit, or no point that does.
        SememeError: `out` holds other figures, or cannot be written to.
        BaseError, CheckpointError, DataError: no such model, base or text; a model without
            concepts."""
    kind, recipe, asked = torch_dtype(dtype), run_recipe(model), grid or Grid()
    subject = find_subject(model, base)
    trained = subject.config is not None and not asked.splits
    grid = fill(asked, subject)
    text = data or recipe.get("data", {}).get("heldout")
    if text is not None:
        read_texts(text)  # a wrong name must not show in every point
    settings = {
        "new_tokens": new_tokens,
        "repeats": repeats,
        "dtype": dtype,
        "prompts": text or "random tokens",
        "concepts": "as trained" if trained else UNTRAINED,
        "weights": subject.weights if trained else None,
        "attention": "sdpa",
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    found = _begin(
        out,
        {"kind": KIND, "model": str(model), "base_name": subject.base_name, "settings": settings},
    )
    points = [
        Point(*p)
        for p in itertools.product(grid.splits, grid.rates, grid.prompt_lengths, grid.batches)
    ]
    done = {tuple(one[key] for key in KEYS) for one in found["points"] if one["fault"] is None}
    todo = [p for p in points if tuple(p.keys.values()) not in done]
    load = partial(Bench, subject, trained, grid.rates, kind, base)
    timing = Timing(subject, load, text, new_tokens, repeats, out / FILE, found)
    timing.run(todo, _llama_lengths(found, grid), say, show)
    if not any(one["fault"] is None for one in found["points"]):
        first = found["points"][0]["fault"]
        raise RecipeError(
            f"none of {len(found['points'])} points could be timed, the first because of this: "
            f"{first}"
        )
    return found


def _begin(out: Path, head: dict[str, Any]) -> dict[str, Any]:
    """What OUT/sweep.json holds, if it was measured alike; else a fresh one, not written yet."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        storage.check(out / FILE)
        text = (out / FILE).read_text(encoding="utf-8") if (out / FILE).exists() else None
        found = json.loads(text) if text is not None else head | {"points": [], "alternatives": []}
    except OSError as error:
        raise SememeError(
            f"{out} cannot be used ({error.strerror}): need a folder that can be written to. try: "
            "another --out"
        ) from error
    except ValueError:
        found = {}
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise SememeError(
            f"{out / FILE} is not of `sememe benchmark --sweep`: need a folder without it. try: "
            f"--out {out}-speed"
        )
    was, now = (
        {key: one.get(key) for key in ("model", "base_name")} | one.get("settings", {})
        for one in (found, head)
    )
    if other := [key for key in now if was.get(key) != now[key]]:
        raise SememeError(
            f"{out / FILE} was measured with {other[0]} = {was.get(other[0])}, not "
            f"{now[other[0]]}: need the same "
            f"to go on with it. try: --out {out}-2"
        )
    return found


def _llama_lengths(found: dict[str, Any], grid: Grid) -> list[int]:
    """Prompt lengths that llama.cpp has no figures for. Where it is missing, there is one row that
    says so."""
    rows = [one for one in found["alternatives"] if one["name"] == alternatives.LLAMA]
    have = {one["prompt_tokens"] for one in rows if one["fault"] is None}
    if any(one["fault"] for one in rows) and alternatives.llama_cpp()[0] is None:
        return []
    return [length for length in grid.prompt_lengths if length not in have]


@dataclass
class Timing:
    """The points of one sweep, one after the other, into its file. Loads the models when the first
    is to be timed."""

    subject: Subject
    load: Callable[[], Bench]
    text: str | None
    new_tokens: int
    repeats: int
    file: Path
    found: dict[str, Any]

    @cached_property
    def bench(self) -> Bench:
        return self.load()

    def run(
        self, points: list[Point], lengths: list[int], say: Callable[[str], None], show: bool
    ) -> None:
        rounds = ROUNDS * (self.repeats + 1)
        with tqdm(
            total=rounds * len(points), desc="benchmark", unit="run", disable=not show
        ) as bar:
            for place, point in enumerate(points, 1):
                bar.set_description(f"{place} of {len(points)}: {point}")
                before = bar.n
                entry = self.point(point, lambda: bar.update(1))
                if entry["fault"]:
                    bar.total -= rounds - (bar.n - before)
                    bar.refresh()
                self.keep(entry)
            try:
                measured = {
                    one["prompt_tokens"] for one in self.found["points"] if one["fault"] is None
                }
                self.llama([n for n in lengths if n in measured], bar, say)
            except SememeError as error:
                self.alternative(alternatives.row(alternatives.LLAMA, fault=str(error)))

    def point(self, point: Point, tick: Callable[[], None]) -> dict[str, Any]:
        """Its entry in sweep.json, with the fault where there is one."""
        entry = point.keys | {"fault": self.too_long(point)}
        if entry["fault"]:
            return entry
        bench = self.bench
        try:
            model = bench.at(point.split, point.rate)
            if fault := self.too_large(point, model):
                return entry | {"fault": fault}
            ids_BT = prompts(self.text, bench.tokenizer, point.prompt_tokens, point.batch).to(
                bench.device
            )
            reset_peak(bench.device)
            figures = benchmark_use(model, bench.plain, ids_BT, self.new_tokens, self.repeats, tick)
        except SememeError as error:
            return entry | {"fault": str(error)}
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return entry | {
                "fault": f"out of memory on {bench.device}: need a smaller point. try: {self.smaller(point)}"
            }
        if fault := unclear(figures["concept"], figures["base"]):
            return entry | {"fault": fault}
        return (
            entry
            | figures
            | {
                "decode_speedup_range": decode_range(figures["concept"], figures["base"]),
                "share_of_ceiling": figures["decode_speedup"] / figures["ceiling_decode_speedup"],
                "peak_bytes": peak_bytes(bench.device),
            }
        )

    def too_long(self, point: Point) -> str | None:
        try:
            check_length(
                self.subject.places, point.prompt_tokens, "--prompt-lengths ", self.new_tokens
            )
        except DataError as error:
            return str(error)
        return None

    def too_large(self, point: Point, model: OnlineForCausalLM) -> str | None:
        tokens, chunk = (
            point.prompt_tokens + self.new_tokens,
            getattr(model.config, "prefill_chunk", 0),
        )
        plain, free = self.bench.plain, free_bytes(self.bench.device)
        needed = needed_bytes(
            plain.config.get_text_config(), point.batch, tokens, plain.dtype, chunk
        )
        if free is None or needed <= free:
            return None
        return (
            f"it takes about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: need a "
            "smaller point. "
            f"try: {self.smaller(point)}"
        )

    @staticmethod
    def smaller(point: Point) -> str:
        return (
            "--batches 1"
            if point.batch > 1
            else f"--prompt-lengths {max(2, point.prompt_tokens // 2)}"
        )

    def llama(self, lengths: list[int], bar: tqdm, say: Callable[[str], None]) -> None:
        """Rows of llama.cpp, or the one that says why there are none."""
        module, fault = alternatives.llama_cpp()
        if fault is not None:
            self.alternative(alternatives.row(alternatives.LLAMA, fault=fault))
        if fault is not None or not lengths:
            return
        bar.total += 2 * (self.repeats + 1) * len(lengths)
        bar.set_description(alternatives.LLAMA)
        with tqdm.external_write_mode():
            gguf = alternatives.gguf_of(self.subject.base_name, self.subject.base_folder, say)
        bench = self.bench
        texts = [prompts(self.text, bench.tokenizer, length, 1) for length in lengths]
        try:
            for one in alternatives.llama_rows(
                module,
                gguf,
                texts,
                self.new_tokens,
                self.repeats,
                bench.device.type == "cuda",
                lambda: bar.update(1),
            ):
                self.alternative(one)
        except (OSError, ValueError, RuntimeError) as error:
            raise SememeError(
                f"it could not run {gguf.name} ({(str(error).splitlines() or [''])[0]})"
            ) from error

    def keep(self, entry: dict[str, Any]) -> None:
        """Puts a point into the file, in the place of an older fault, and what follows from it for
        the alternatives."""
        points = [
            one for one in self.found["points"] if any(one[key] != entry[key] for key in KEYS)
        ]
        points.append(entry)
        self.found["points"] = sorted(
            points, key=lambda p: (_split(p["split"]), -p["rate"], p["prompt_tokens"], p["batch"])
        )
        self.alternative()

    def alternative(self, *rows: dict[str, Any]) -> None:
        """Puts rows of llama.cpp into the file; one without a prompt length is a fault of all, and
        gives way."""
        old = {None, *(one["prompt_tokens"] for one in rows)}
        kept = [
            one
            for one in self.found["alternatives"]
            if one["name"] == alternatives.LLAMA and one["prompt_tokens"] not in old
        ]
        points, dtype = self.found["points"], self.found["settings"]["dtype"]
        both = alternatives.transformers_rows(points, dtype) + sorted(
            [*kept, *rows], key=lambda one: one["prompt_tokens"] or 0
        )
        self.found["alternatives"] = alternatives.compared(both, points)
        put(self.file, self.found)


def decode_range(concept: dict[str, Any], base: dict[str, Any]) -> list[float] | None:
    """[least, most] decode speed-up: the slowest round of one side against the fastest of the
    other. None where the fastest round of either took no longer than reading alone."""
    (least, most), (base_least, base_most) = (
        [
            side["generate_seconds"][end] - side["prefill_seconds"]["median"]
            for end in ("min", "max")
        ]
        for side in (concept, base)
    )
    return [base_least / most, base_most / least] if min(least, base_least) > 0 else None
