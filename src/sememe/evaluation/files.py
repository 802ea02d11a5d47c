"""Models and text by name → figures, beside the run they belong to (RUN/evaluate.json,
RUN/benchmark.json)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sememe.data import read_texts, token_blocks
from sememe.errors import CheckpointError, SememeError
from sememe.evaluation.dial import check_rates, dial, rate_error
from sememe.evaluation.figures import CONTRACT, keep, run_recipe
from sememe.evaluation.heldout import heldout_blocks, heldout_texts
from sememe.evaluation.partial import Partial, partial_of
from sememe.evaluation.plan_files import Search, evaluate_pair_files, pair_form
from sememe.evaluation.quality import evaluate
from sememe.evaluation.speed import benchmark_training, benchmark_use
from sememe.models import ControlConfig, ControlForCausalLM
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import ConceptConfig
from sememe.models.loading import (
    check_length,
    load_base,
    load_model,
    load_tokenizer,
    longest_text,
    model_folder,
    resolve,
)
from sememe.models.online import OnlineForCausalLM
from sememe.progress import advance
from sememe.progress import bar as progress_bar

BY_DATA = ("data", *CONTRACT, "target_rate", "rate_error_percent", "dial")


def evaluate_files(
    model: str,
    data: str | Sequence[str],
    tokens: int = 8192,
    control: str | None = None,
    sequence_length: int | None = None,
    batch: int = 4,
    base: str | None = None,
    rate: float | None = None,
    rates: Sequence[float] = (),
    search: Search | None = None,
    answers: bool = False,
    signals: int = 0,
    budget: Sequence[int] = (),
    seconds: float | None = None,
) -> dict[str, Any]:
    """`evaluation.quality.evaluate` on a saved model and a text; kept as RUN/evaluate.json.

    Several texts are measured one by one: the figures are those of the first, and `by_data` has one
    line for each. `rate` is the dial that all is measured at; `rates` are more of its settings,
    each a line of `dial`. What reads pairs has the figures of `evaluation.plans` instead; `search`
    finds z* for them, `answers` counts those that are right, `signals` probes what plans tell,
    `budget` bounds a planner's plans. Running text is measured in parts, which a run keeps: the
    same call goes on after a stop. `seconds`: about what each text may take; fewer tokens are
    measured where it is short.

    Raises:
        DataError: a text is missing, too short, or the one that the run was trained on.
        CheckpointError: `model` or `control` cannot be loaded, their tokenizers differ, or there is
            no rate to set.
        RecipeError: a rate that the model cannot hold."""
    names = [data] if isinstance(data, str) else list(data)
    if pair_form(model) is not None:
        return evaluate_pair_files(
            model,
            names,
            tokens,
            control,
            batch,
            base,
            search,
            sequence_length,
            rate,
            rates,
            answers,
            signals,
            budget,
        )
    for option, value in (("--answers", answers), ("--signals", signals), ("--rate", budget)):
        if value:
            raise SememeError(
                f"got {option}, but {model} reads running text, not pairs of a source and a "
                "target: need pairs. "
                f"try: without {option}"
            )
    texts = [heldout_texts(model, name) for name in names]
    loaded, tokenizer = load_model(model, base=base, rate=rate)
    check_rates(loaded, rates, model)
    blocks = [
        heldout_blocks(model, loaded, tokenizer, text, tokens, sequence_length) for text in texts
    ]
    other = None
    if control is not None:
        other, other_tokenizer = load_model(control, base=base)
        if other_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise CheckpointError(
                f"{control} has another tokenizer than {model}: need the same base. try: its own "
                "control"
            )
    passes = (
        (4 if isinstance(loaded.config, ConceptConfig) else 1) + (other is not None) + len(rates)
    )
    found = []
    partial = partial_of(
        model,
        "evaluate.json",
        control,
        texts=[one.ids_NT for one in blocks],
        batch=batch,
        rate=rate,
        threads=torch.get_num_threads(),
        device=str(loaded.device),
    )
    total = passes * sum(one.ids_NT.numel() for one in blocks)
    with progress_bar(total=total, desc="evaluate", unit="token", mininterval=1) as bar:

        def tick(tokens: int) -> None:
            if seconds is not None and len(blocks) == 1:  # what there will be time for
                bar.total = max(
                    bar.n + tokens,
                    min(total, round((bar.n + tokens) * seconds / max(partial.seconds, 1e-9))),
                )
            advance(bar, tokens, partial.reused)

        for place, (name, one) in enumerate(zip(names, blocks, strict=True)):
            result = evaluate(
                loaded, tokenizer, one, other, batch, 2, tick, partial, seconds, f"{place} "
            )
            asked = loaded.dial.rate if isinstance(loaded.config, ConceptConfig) else None
            result |= {
                "model": str(model),
                "data": str(name),
                "control": control,
                "tokens_asked": tokens,
                "target_rate": asked,
                "rate_error_percent": rate_error(result["concept_rate"], asked),
            }
            if rates:
                ids_NT = one.ids_NT[: result["tokens"] // (one.ids_NT.shape[1] - 1)]
                result["dial"] = dial(
                    loaded,
                    ids_NT,
                    rates,
                    result.get("control_nll"),
                    batch,
                    tick,
                    partial,
                    f"{place} ",
                )
            found.append(result)
    result = found[0]
    if len(found) > 1:
        result["by_data"] = [{key: one[key] for key in BY_DATA if key in one} for one in found]
    keep(model, "evaluate.json", result)
    partial.finish()
    return result


def benchmark_files(
    model: str,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    repeats: int = 5,
    training: bool = True,
    data: str | None = None,
    dtype: str = "float32",
    base: str | None = None,
    rate: float | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """`evaluation.speed` on a saved model beside its base; kept as RUN/benchmark.json.

    A run keeps each round when it is timed, and the same call goes on after a stop. `seconds`:
    about what all rounds may take; there are fewer where it is short, but one at least. `rate` is
    the dial.

    Raises CheckpointError where `model` has no concepts, its base is not known any more, or a cache
    stays empty."""
    kind = torch_dtype(dtype)
    folder, recipe = model_folder(model), run_recipe(model)
    loaded, _ = load_model(model, merge=False, dtype=kind, base=base, rate=rate)
    if not isinstance(loaded, OnlineForCausalLM):
        raise CheckpointError(
            f"{model} has no concepts to decode with: need a run of system: online. try: runs/demo"
        )
    named = base_beside(model, loaded.config, base)
    source = resolve(named)
    check_length(longest_text(loaded.config), prompt_tokens, "--prompt-tokens ", new_tokens)
    ids_BT = prompts(
        data or recipe.get("data", {}).get("heldout"), load_tokenizer(source), prompt_tokens, batch
    )
    ids_BT = ids_BT.to(loaded.device)
    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "repeats": repeats,
        "dtype": dtype,
        "attention": "sdpa",
        "threads": torch.get_num_threads(),
        "device": str(loaded.device),
        "prompts": "text" if data or recipe else "random tokens",
        "model_folder": str(folder),
        "target_rate": loaded.dial.rate,
    }
    partial = partial_of(model, "benchmark.json", texts=[ids_BT], training=training, **settings)
    groups = 3 if training and loaded.config.base else 2
    share = None if seconds is None else seconds / groups
    with progress_bar(total=2 * (repeats + 1) * groups, desc="benchmark", unit="run") as bar:

        def tick() -> None:
            advance(bar, 1, partial.reused)

        trained: dict[str, Any] = {}
        if training and loaded.config.base:
            trained = _training(loaded, ids_BT, repeats, kind, source, tick, partial, share)
        if loaded.config.base:
            loaded.merged()
        plain = load_base(source, dtype=kind).to(loaded.device).eval()
        result = benchmark_use(
            loaded.eval(), plain, ids_BT, new_tokens, repeats, tick, partial, share
        )
    for name in ("concept", "base"):
        result[name] |= {"train_tokens_per_s": None, "train_peak_bytes": None} | trained.pop(
            name, {}
        )
    result |= {"train_step_ratio": None, "train_memory_ratio": None} | trained
    result |= {"model": str(model), "base_name": named, "settings": settings}
    keep(model, "benchmark.json", result)
    partial.finish()
    return result


def torch_dtype(name: str) -> torch.dtype:
    """Raises SememeError where nothing is timed in it."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in kinds:
        raise SememeError(f"dtype = {name!r}: need one of {', '.join(kinds)}. try: float32")
    return kinds[name]


def base_beside(model: str, config, base: str | None) -> str:
    """The base that a saved model is compared with: `base`, or the one that it names. Raises
    CheckpointError without any."""
    base = base or os.environ.get("SEMEME_BASE") or config.base
    if base is None:
        raise CheckpointError(
            f"{model} is merged and does not name its base any more: need it to compare. try: "
            "SEMEME_BASE=NAME"
        )
    return base


def prompts(data: str | None, tokenizer, length: int, batch: int) -> torch.Tensor:
    """(B, T) prompts: different blocks of a text, or random tokens where there is none."""
    if data is None:
        return torch.randint(
            3, len(tokenizer), (batch, length), generator=torch.Generator().manual_seed(0)
        )
    blocks = token_blocks(read_texts(data), tokenizer, length, limit=length * batch)
    return blocks[torch.arange(batch) % len(blocks)]


def _training(
    loaded: AdaptedModel,
    ids_BT: torch.Tensor,
    repeats: int,
    dtype: torch.dtype,
    source: Path,
    tick,
    partial: Partial,
    seconds: float | None,
) -> dict:
    """Training-step figures. The gate follows what it sees in training, so it is put back
    afterwards."""
    config, gate = loaded.config, {k: v.clone() for k, v in loaded.writer.gate.state_dict().items()}
    lora = {name: getattr(config, name) for name in ("lora_rank", "lora_alpha", "lora_dropout")}
    control = ControlForCausalLM.from_base(
        ControlConfig(base=config.base, **lora), dtype, folder=source
    )
    found = benchmark_training(
        loaded, control.to(loaded.device), ids_BT, repeats, tick, partial, seconds
    )
    loaded.writer.gate.load_state_dict(gate)
    return found
