"""Decoding of batches whose rows write concepts at the same steps, or at different ones as those of
a server do; as the engine steps them, beside the base."""

from collections.abc import Sequence

import torch
from torch import nn

from sememe.engine.holding import NONE, Hold, Policy, measured_policy
from sememe.evaluation.results import Figures
from sememe.evaluation.speed import about, alternate
from sememe.evaluation.subject import Subject
from sememe.models.loading import check_length, longest_text
from sememe.models.stepping import rows_of

BATCHES = (1, 4, 16, 32, 64)
LARGEST = 16  # unless the options say another
HELD = 12  # rows from which on waiting is timed
SPARE = 3  # times the mean: what a row reads while others wait


class Stepping:
    """Rows of a model that have read the first tokens of their texts, and read on: at each call
    the same tokens.

    Args:
        starts: tokens of each text that are read at first.
        steps: tokens of a row; where rows wait for each other, on average.
        hold: of rows that wait for each other before the middle layers run."""

    def __init__(
        self,
        model: nn.Module,
        texts: Sequence[list[int]],
        starts: Sequence[int],
        steps: int,
        hold: Hold = NONE,
    ):
        self.model, self.texts, self.starts = model, texts, starts
        self.steps, self.hold = steps, () if hold == NONE else hold
        rows = rows_of(model)
        self.cache = rows.start([None] * len(texts))
        rows.read(self.cache, [text[:start] for text, start in zip(texts, starts, strict=True)])

    def __call__(self) -> None:
        rows, positions, count = rows_of(self.model), [*self.starts], 0
        rows.join(self.cache, [1] * len(self.texts))  # as a copy
        while count < self.steps * len(self.texts):
            # A row that hardly ever waits may come to the end of its text.
            tokens = [
                self.texts[row][min(positions[row], len(self.texts[row]) - 1)] for row in rows.ready
            ]
            stepped = rows.step(tokens, *self.hold)
            for row in stepped.rows:
                positions[row] += 1
            count += len(stepped.rows)


def texts_of(subject: Subject, data: str | None, length: int, more: int, batch: int):
    """Texts of `batch` rows, and how many tokens of each are its prompt: from half of `length` to
    all of it, at another phase of any stride than its neighbours; `more` are behind it."""
    ids_BT = subject.prompts(data, length + more, batch)["input_ids"].tolist()
    offset = length // (4 * batch) * 2 + 1  # has no factor with a stride of 2, 4, 8 …
    starts = [row * offset % (length // 2) for row in range(batch)]
    return [ids[start:] for ids, start in zip(ids_BT, starts, strict=True)], starts


def batch_figures(
    subject: Subject, base: nn.Module, policy: Policy, data: str | None, length: int, batch: int
):
    """Speeds of one batch, and over that of the base at the same rows."""
    model, options = subject.model, subject.options
    texts, starts = texts_of(subject, data, length, SPARE * options.new_tokens, batch)
    prompts = [length - start for start in starts]
    same, whole = [texts[0]] * batch, [length] * batch
    jobs = {
        "base": Stepping(base, texts, prompts, options.new_tokens),
        "in_phase": Stepping(model, same, whole, options.new_tokens),
        "out_of_phase": Stepping(model, texts, prompts, options.new_tokens),
    }
    chosen = policy(batch, model.dial.rate)
    hold = chosen if chosen != NONE else (batch // 2, 4)
    if batch >= HELD:
        jobs["held"] = Stepping(model, texts, prompts, options.new_tokens, hold)
    seconds = dict(zip(jobs, alternate(jobs.values(), options.repeats), strict=True))
    median = {name: times["median"] for name, times in seconds.items()}
    figures: Figures = {"batch": batch}
    for name in jobs:
        figures[f"{name}_tokens_per_s"] = batch * options.new_tokens / median[name]
    for name in ("in_phase", "out_of_phase", "held"):
        figures[f"{name}_speedup"] = median["base"] / median[name] if name in median else None
    held = "held" in median
    figures["hold_gain"] = median["out_of_phase"] / median["held"] if held else None
    figures |= {"hold": [*hold] if held else None, "engine_holds": chosen != NONE}
    return figures | {"seconds": seconds}


@torch.inference_mode()
def sweep_batches(subject: Subject, length: int | None, data: str | None) -> Figures:
    """Of an online model: batches up to that of the options, or of 16 rows. Leaves the model
    merged."""
    options, length = subject.options, length or 64
    more = SPARE * options.new_tokens
    check_length(longest_text(subject.model.config), length, "--prompt-tokens ", more)
    base, largest = subject.load_base(), options.batch or LARGEST
    settings = about(subject, data, prompt_tokens=length, new_tokens=options.new_tokens)
    if subject.model.config.base is not None:
        subject.model.merged()
    sizes = sorted({size for size in BATCHES if size < largest} | {largest})
    policy = measured_policy(subject.model)
    figures = [batch_figures(subject, base, policy, data, length, size) for size in sizes]
    return {"batches": figures} | settings
