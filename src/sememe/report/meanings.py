"""Each key of the run's files: how it is shown and what it means in one line. A new key is one line here."""

from dataclasses import dataclass

from sememe.report.values import show

UNDESCRIBED = "(no description in this version)"
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Row:
    key: str
    value: str
    meaning: str


# key → (kind of values.show, meaning)
EVALUATE: dict[str, tuple[str, str]] = {
    "data": ("", "the text that was evaluated"),
    "tokens": ("count", "normal tokens of that text that were predicted"),
    "nll": ("nats", "mean surprise per predicted token, in nats; lower is better"),
    "bits_per_byte": ("nats", "the same surprise in bits per byte of text, comparable between tokenizers"),
    "concept_rate": ("share", "concepts written per normal token, over the whole text"),
    "compression_ratio": ("ratio", "R: normal tokens per concept, 1 / concept rate"),
    "nll_at_concepts": ("nats", "NLL where the position itself has just written a concept"),
    "nll_in_tail": ("nats", "NLL where the position is in the tail, after the last concept"),
    "longest_tail": ("count", "the longest stretch of tokens without a concept"),
    "delta_nll_control": ("delta", "NLL minus that of the control (same training, no concepts)"),
    "delta_nll_zero": ("delta", "what NLL rises by when all concepts are set to zero"),
    "delta_nll_shuffle": ("delta", "what NLL rises by when concepts are shuffled over the whole batch"),
    "delta_nll_random": ("delta", "what NLL rises by when concepts are replaced by random ones"),
    "code_perplexity": ("", "as varied as this many codes used equally often"),
    "codes_used": ("count", "different codes that occur at least once"),
    "num_concepts": ("count", "codes there are to choose from"),
    "largest_code_share": ("share", "share of the most frequent code among all concepts"),
    "control_nll": ("nats", "NLL of the control"),
    "sequence_length": ("count", "tokens in each text block that was evaluated"),
    "model": ("", "the model that was evaluated"),
    "control": ("", "the control that it was compared with"),
}

# Drawn as plots or sample texts, not as table rows.
EVALUATE_DRAWN = frozenset({"nll_by_position", "code_counts", "samples"})

# Keys of benchmark.json that are no plain figure.
BENCHMARK_APART = frozenset({"concept", "base", "settings"})

BENCHMARK_SIDES: dict[str, tuple[str, str]] = {
    "prefill_tokens_per_s": ("speed", "reading a prompt"),
    "decode_tokens_per_s": ("speed", "writing new tokens one after another"),
    "cache_bytes": ("bytes", "memory of the cache at the end"),
    "train_tokens_per_s": ("speed", "training, forward and backward; the base with the same LoRA"),
}

BENCHMARK: dict[str, tuple[str, str]] = {
    "prefill_speedup": ("ratio", "reading speed over that of the unmodified base"),
    "decode_speedup": ("ratio", "writing speed over that of the unmodified base"),
    "ceiling_decode_speedup": ("ratio", "the most that the layer arithmetic allows at this split and rate"),
    "cache_reduction": ("ratio", "how many times smaller the cache is than that of the base"),
    "train_step_ratio": ("ratio", "time of a training step over that of the control (same LoRA, no concepts); below 1 is faster"),
    "realised_rate": ("share", "concepts per token in the timed generation"),
    "model": ("", "the model that was timed"),
    "base_name": ("", "the unmodified base beside it"),
}

METRICS: dict[str, tuple[str, str]] = {
    "step": ("count", "optimiser steps done"),
    "tokens": ("count", "normal tokens trained on"),
    "seconds": ("time", "time spent"),
    "loss": ("nats", "training loss, nats per token"),
    "heldout_nll": ("nats", "NLL on held-out text"),
    "heldout_rate": ("share", "concepts per token on held-out text; should equal the training rate"),
    "rate": ("share", "concepts written per normal token in training"),
    "target_rate": ("share", "the rate asked for at that step"),
    "quantise": ("share", "how much of a concept is the discrete code; the rest is still continuous"),
    "longest_tail": ("count", "the longest stretch of tokens without a concept"),
    "code_perplexity": ("", "as varied as this many codes used equally often"),
    "codes_used": ("count", "different codes that occur at least once"),
    "learning_rate": ("", "learning rate"),
    "grad_norm": ("", "length of the gradient; near 0 or exploding is a fault"),
}


def rows(figures: dict, meanings: dict[str, tuple[str, str]], skip: frozenset[str] = NONE) -> list[Row]:
    """The known keys in the table's order, then those this version does not know."""
    known = [key for key in meanings if key in figures]
    unknown = [key for key in figures if key not in meanings and key not in skip]
    described = [Row(key, show(figures[key], meanings[key][0]), meanings[key][1]) for key in known]
    return described + [Row(key, show(figures[key]), UNDESCRIBED) for key in unknown]
