"""Each key of the run's files: how it is shown and what it means in one line. A new key is one line
here."""

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
    "bits_per_byte": (
        "nats",
        "the same surprise in bits per byte of text, comparable between tokenizers",
    ),
    "concept_rate": ("share", "concepts written per normal token, over the whole text"),
    "compression_ratio": ("ratio", "R: normal tokens per concept, 1 / concept rate"),
    "target_rate": ("share", "the concept rate that was asked for"),
    "rate_error_percent": ("", "how far the concept rate is from that, in % of it"),
    "dial": ("", "the same model at other rates"),
    "by_data": ("", "each text on its own; the other figures are of the first"),
    "nll_at_concepts": ("nats", "NLL where the position itself has just written a concept"),
    "nll_in_tail": ("nats", "NLL where the position is in the tail, after the last concept"),
    "longest_tail": ("count", "the longest stretch of tokens without a concept"),
    "delta_nll_control": ("delta", "NLL minus that of the control (same training, no concepts)"),
    "delta_nll_zero": ("delta", "what NLL rises by when all concepts are set to zero"),
    "delta_nll_shuffle": (
        "delta",
        "what NLL rises by when concepts are shuffled over the whole batch",
    ),
    "delta_nll_random": ("delta", "what NLL rises by when concepts are replaced by random ones"),
    "code_perplexity": ("", "as varied as this many codes used equally often"),
    "codes_used": ("count", "different codes that occur at least once"),
    "layer_share": (
        "share",
        "layers run per token, as a share of the base's; what computing is left",
    ),
    "num_concepts": ("count", "codes there are to choose from"),
    "codes_per_concept": (
        "count",
        "codes that a concept is the sum of; of several, the figures above are of the first",
    ),
    "code_perplexity_by_stage": (
        "",
        "perplexity of each of a concept's codes, the first one first",
    ),
    "bits_per_concept": (
        "",
        "bits that a concept carries at most: the entropy of the codes in use",
    ),
    "largest_code_share": ("share", "share of the most frequent code among all concepts"),
    "control_nll": ("nats", "NLL of the control"),
    "sequence_length": ("count", "tokens in each text block that was evaluated"),
    "model": ("", "the model that was evaluated"),
    "control": ("", "the control that it was compared with"),
    "tokens_asked": (
        "count",
        "tokens that the measurement asked for; whole blocks of them were used",
    ),
    "system": (
        "",
        "online (with concepts), control (without), skip (without the middle layers), or window "
        "(of the last tokens)",
    ),
    "boundary": ("", "what decides where a concept is written"),
}

# Drawn as plots or sample texts, not as table rows.
EVALUATE_DRAWN = frozenset({"nll_by_position", "code_counts", "samples"})

# Keys of benchmark.json that are no plain figure.
BENCHMARK_APART = frozenset({"concept", "base", "settings"})

BENCHMARK_SIDES: dict[str, tuple[str, str]] = {
    "prefill_tokens_per_s": ("speed", "reading a prompt"),
    "decode_tokens_per_s": ("speed", "writing new tokens one after another"),
    "cache_bytes": ("bytes", "memory of the cache at the end"),
    "read_tokens_per_s": ("speed", "compressing a text; the base: one plain forward over it"),
    "write_tokens_per_s": (
        "speed",
        "decompressing it; the base: writing as many tokens one after another",
    ),
    "tokens_written": ("count", "tokens written in a round"),
    "weight_bytes": ("bytes", "memory of the weights"),
    "prefill_peak_bytes": (
        "bytes",
        "the most memory in use while a prompt is read, weights and cache counted",
    ),
    "train_tokens_per_s": ("speed", "training, forward and backward; the base with the same LoRA"),
    "train_peak_bytes": (
        "bytes",
        "the most memory in use in a training step, weights and optimiser counted",
    ),
}

BENCHMARK: dict[str, tuple[str, str]] = {
    "prefill_speedup": ("ratio", "reading speed over that of the unmodified base"),
    "decode_speedup": ("ratio", "writing speed over that of the unmodified base"),
    "ceiling_decode_speedup": (
        "ratio",
        "the most that the layer arithmetic allows at this split and rate",
    ),
    "cache_reduction": ("ratio", "how many times smaller the cache is than that of the base"),
    "compress_base_forwards": (
        "ratio",
        "time of compressing a text over that of one forward of the base; below 1 is less",
    ),
    "compress_base_forwards_range": ("", "the least and the most of that over the rounds"),
    "compress_base_forwards_no_logits": (
        "ratio",
        "the same, where the base computes no logits but the last",
    ),
    "decompress_speedup": ("ratio", "decompressing speed over that of the base's own writing"),
    "decompress_speedup_range": ("", "the least and the most of that over the rounds"),
    "ids_per_token": ("", "ids per token of the text, every one counted"),
    "compression_ratio": ("", "tokens of the text per id"),
    "train_step_ratio": (
        "ratio",
        "time of a training step over that of the control (same LoRA, no concepts); below 1 is "
        "faster",
    ),
    "prefill_memory_ratio": (
        "ratio",
        "memory that reading takes over that of the base, weights counted; below 1 is less",
    ),
    "train_memory_ratio": (
        "ratio",
        "memory that a training step takes over that of the control; below 1 is less",
    ),
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
    "heldout_rate": (
        "share",
        "concepts per token on held-out text; should equal the training rate",
    ),
    "rate": ("share", "concepts written per normal token in training"),
    "target_rate": ("share", "the rate asked for at that step"),
    "quantise": (
        "share",
        "how much of a concept is the discrete code; the rest is still continuous",
    ),
    "longest_tail": ("count", "the longest stretch of tokens without a concept"),
    "code_perplexity": ("", "as varied as this many codes used equally often"),
    "codes_used": ("count", "different codes that occur at least once"),
    "learning_rate": ("", "learning rate"),
    "grad_norm": ("", "length of the gradient; near 0 or exploding is a fault"),
    "stopped": ("", "why training stopped before its end"),
    "grad_norm_lora": ("", "length of the gradient of the adapters (LoRA)"),
    "grad_norm_head": ("", "length of the gradient of the head that writes concepts"),
    "grad_norm_codes": ("", "length of the gradient of the codes themselves"),
    "grad_norm_bridge": ("", "length of the gradient of the bridge that completes the tail"),
    "grad_norm_anchor": ("", "length of the gradient of the anchor that gives a concept its token"),
    "grad_norm_pool": ("", "length of the gradient of the pool that gives a concept its tail"),
    "grad_norm_next_embedding": (
        "",
        "length of the gradient of the map that foretells a compressor's next token",
    ),
    "grad_norm_decompressor": (
        "",
        "length of the gradient of what a decompressor reads concepts by",
    ),
    "grad_norm_segmenter": (
        "",
        "length of the gradient of what says how long an autoregressive concept is",
    ),
    "length_penalty": (
        "nats",
        "what a concept of boundary: autoregressive costs, so that the rate is held",
    ),
    "tail_mean": ("", "tokens without a concept in a row, on average, in training"),
    "largest_code_share": ("share", "share of the most frequent code among all concepts"),
    "bits_per_concept": (
        "",
        "bits that a concept carries at most: the entropy of the codes in use",
    ),
    "heldout_tail_mean": ("", "tokens without a concept in a row, on average, on held-out text"),
    "delta_nll_zero": (
        "delta",
        "what NLL rises by when all concepts are set to zero, on a small fixed held-out batch",
    ),
    "delta_nll_shuffle": ("delta", "the same with concepts shuffled over the batch"),
    "delta_nll_random": ("delta", "the same with random concepts"),
    "code_entropy": ("nats", "how undecided the head is between codes; 0 is certain"),
    "code_max_prob": ("share", "probability that the head gives its first choice"),
    "soft_hard_cosine": (
        "",
        "direction of the soft mixture against that of the chosen code; 1 is the same",
    ),
    "soft_hard_distance": (
        "",
        "distance of the soft mixture to the chosen code, in lengths of the code",
    ),
}

# Drawn as plots, not as table rows.
METRICS_DRAWN = frozenset({"heldout_tail_histogram", "heldout_nll_by_position"})


@dataclass(frozen=True)
class Panel:
    """One set of axes: what stands at its side, and the curves on it (key → legend)."""

    y: str
    curves: dict[str, str]
    log: bool = False


@dataclass(frozen=True)
class Instrument:
    title: str
    meaning: str
    panels: tuple[Panel, ...]


# Drawn over the steps, where their keys are in metrics.jsonl. A new instrument is one entry here.
INSTRUMENTS = (
    Instrument(
        "Cost of ablating the codes",
        "What NLL on a small fixed held-out batch rises by without the true codes: near 0 for "
        "zero, they are not read; near 0 "
        "for shuffled, any code would do as well.",
        (
            Panel(
                "NLL rises by (nats)",
                {
                    "delta_nll_zero": "set to zero",
                    "delta_nll_shuffle": "shuffled",
                    "delta_nll_random": "random",
                },
            ),
        ),
    ),
    Instrument(
        "Codes in use",
        "Perplexity is how many codes are in even use, and bits what a concept can carry at most; "
        "perplexity far below the "
        "codes that occur is a collapse.",
        (
            Panel(
                "codes",
                {"code_perplexity": "perplexity", "codes_used": "codes that occur"},
                log=True,
            ),
            Panel("bits", {"bits_per_concept": "bits per concept"}),
        ),
    ),
    Instrument(
        "Soft mixture against chosen code",
        "The gradient sees the soft mixture and the model reads the chosen code: a cosine that "
        "stays low, or a distance that "
        "stays large, means that training improves something else than what is used.",
        (
            Panel("cosine", {"soft_hard_cosine": "cosine"}),
            Panel("distance", {"soft_hard_distance": "distance"}),
        ),
    ),
    Instrument(
        "How sure the head is",
        "Entropy between the codes and the probability of the first choice: certain early, with "
        "few codes in use, is a collapse; "
        "undecided to the end, and the codes hardly differ.",
        (
            Panel("entropy (nats)", {"code_entropy": "entropy"}),
            Panel("probability", {"code_max_prob": "first choice"}),
        ),
    ),
    Instrument(
        "Gradient norms",
        "Length of the gradient, before clipping, of everything and of each module: near 0, a "
        "module learns nothing; growing "
        "without end, the learning rate is too high.",
        (
            Panel(
                "norm",
                {
                    "grad_norm": "all",
                    "grad_norm_lora": "LoRA",
                    "grad_norm_head": "head",
                    "grad_norm_codes": "codes",
                    "grad_norm_bridge": "bridge",
                    "grad_norm_anchor": "anchor",
                    "grad_norm_pool": "pool",
                },
                log=True,
            ),
        ),
    ),
    Instrument(
        "Tail length",
        "Tokens in a row without a concept, on average: training and held-out text apart means "
        "that the gate behaves "
        "differently where it is not trained.",
        (Panel("tokens", {"tail_mean": "training", "heldout_tail_mean": "held out"}),),
    ),
)

POSITION_OVER_STEPS = (
    "NLL on held-out text by how far into the text a token stands, while training: if only the "
    "first group falls, "
    "the concepts serve the opening alone."
)
TAILS = (
    "How many segments of held-out text have how many tokens before the one that writes, at the "
    "last measurement: a single bar "
    "is a regular stride, a pile at the right end means that concepts are forced."
)
PARETO = (
    "Each mark is a trained model: how much it predicts worse than its control (up) and how many "
    "of the base's layers it still "
    "runs per token (right); down and left is better, and the dashed line joins what nothing else "
    "beats in both."
)
TOKENS = (
    "Held-out NLL against the tokens trained on, on a scale of doublings; in brackets what another "
    "doubling brings, in nats, "
    "by a straight line through the points filled in (three at least)."
)
TOKENS_WHOLE = " Each point is a whole run."
TOKENS_WITHIN = (
    " Hollow points, before the schedule is through or in the first half, are left out of it. "
    "Within a run the learning rate "
    "falls as well: compare the slopes, do not draw them on."
)
TOKENS_DELTA = " Below: the same minus the control at equal tokens; a line that falls says that more training closes the gap."


SWEEP: dict[str, tuple[str, str]] = {
    "layer_share": ("share", "layers"),
    "compression_ratio": ("ratio", "R"),
    "nll": ("nats", "NLL"),
    "delta_nll_control": ("delta", "Δ control"),
    "delta_nll_zero": ("delta", "Δ zero"),
    "delta_nll_shuffle": ("delta", "Δ shuffle"),
    "code_perplexity": ("", "code perplexity"),
}


def rows(
    figures: dict, meanings: dict[str, tuple[str, str]], skip: frozenset[str] = NONE
) -> list[Row]:
    """The known keys in the table's order, then those this version does not know."""
    known = [key for key in meanings if key in figures]
    unknown = [key for key in figures if key not in meanings and key not in skip]
    described = [Row(key, show(figures[key], meanings[key][0]), meanings[key][1]) for key in known]
    return described + [Row(key, show(figures[key]), UNDESCRIBED) for key in unknown]
