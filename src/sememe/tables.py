"""What commands print and write: tables of figures, and JSON beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from sememe.console import out, say
from sememe.evaluation.figures import CONTRACT, put


def write_json(
    to: Path | TextIO | None, value: Any, show: Callable[[], None] | None = None
) -> None:
    """What `--json` asks for, if it does: a file, or the stdout that the option has set aside. Then
    `show`: neither a terminal that cannot print something nor a full disk costs both."""
    try:
        if isinstance(to, Path):
            put(to, value)
        elif to is not None:
            to.write(json.dumps(value, indent=1) + "\n")  # ASCII, whatever the terminal's encoding
    finally:
        if show is not None:
            show()


def table(rows: list[tuple], title: str, columns: tuple[str, ...], narrow: bool = False) -> None:
    """`narrow`: for many columns; nothing between them but space, and no cell is broken."""
    made = Table(
        title=title,
        title_justify="left",
        **({"box": None, "padding": (0, 2, 0, 0)} if narrow else {}),
    )
    for i, name in enumerate(columns):
        made.add_column(
            name,
            justify="right" if i and name else "left",
            overflow="ellipsis" if i else "fold",
            no_wrap=narrow,
        )
    for row in rows:
        made.add_row(*(figure(cell) for cell in row))
    out.print(made)


def figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def show_quality(result: dict[str, Any]) -> None:
    table(
        [(key, result[key]) for key in CONTRACT],
        f"{result['model']} on {result['data']}",
        ("measure", "value"),
    )
    asked = {
        "target_rate": "rate asked",
        "concept_rate": "realised",
        "rate_error_percent": "error, %",
        "nll": "NLL",
        "delta_nll_control": "Δ control",
    }
    if "by_data" in result:
        rows = [
            (one["data"], one["tokens"], *(one[key] for key in asked)) for one in result["by_data"]
        ]
        table(rows, f"{result['model']} on each text", ("data", "tokens", *asked.values()))
    for one in result.get("by_data", [result]):
        if "dial" in one:
            rows = [tuple(line[key] for key in asked) for line in one["dial"]]
            table(rows, f"the dial on {one['data']}", tuple(asked.values()))


SIGNALS = {
    "accuracy": "right",
    "base_accuracy": "the most frequent",
    "auroc": "AUROC",
    "loss": "nats a label",
    "base_loss": "by frequency",
}


def show_plans(result: dict[str, Any]) -> None:
    """What a target is read from, beside each other; equal tokens throughout."""
    names = {
        "planner": "the planner's own plan",
        "posterior": "z*, found with the target in view",
        "shuffle": "plans shuffled",
        "random": "random plans",
        "empty": "no plan",
        "source": "the source itself",
    }
    for one in result.get("by_data", [result]):
        asked = ("answers right",) if "answers" in one else ()
        rows = [
            (
                names.get(line["given"], line["given"]),
                line["nll"],
                f"{line['delta_nll']:+.4f}",
                line["plan_nats_per_token"],
                *(f"{line['right']:.1%}" for _ in asked),
            )
            for line in one["given"]
        ]
        table(
            rows,
            f"{one['model']} on {one['data']}: {one['tokens']:,} target tokens of {one['pairs']} "
            "pairs",
            ("given", "NLL", "Δ", "plan, nats/token", *asked),
        )
        if "plan_sizes" in one:
            keys = ("plan_sizes", "plan_most", "plan_lengths", "plan_ids_used", "plan_perplexity")
            rows = [
                (f"type {i}", *cells)
                for i, cells in enumerate(zip(*(one[key] for key in keys), strict=True))
            ]
            table(
                rows,
                f"entropy {one['plan_entropy']:.3f} nats a concept, largest probability "
                f"{one['plan_max_prob']:.3f}",
                ("the planner's plans", "ids", "at most", "mean length", "ids used", "perplexity"),
            )
        if "signals" in one:
            rows = [
                (name, *(found[key] for key in SIGNALS)) for name, found in one["signals"].items()
            ]
            table(
                rows,
                "what its plans tell of the target, by linear probes",
                ("signal", *SIGNALS.values()),
            )


def show_ablation(result: dict[str, Any]) -> None:
    """A table whose last column is the curve."""
    found = {f"drop {100 * one['share']:g} %": one for one in result["drop"]}
    found |= {
        kind: result[kind]
        for kind in ("zero", "empty", "shuffle", "random", "swap")
        if kind in result
    }
    most = max(one["delta_nll"] for one in found.values())
    rows = []
    for name, one in found.items():
        bar = "█" * round(32 * one["delta_nll"] / most) if most > 0 else ""
        delta, low, high = (
            f"{one[key]:+.4f}" for key in ("delta_nll", "delta_nll_min", "delta_nll_max")
        )
        rows.append((name, delta, low, high, bar))
    title = f"{result['model']} on {result['data']}: NLL {result['nll']:.4f}; ΔNLL over {result['seeds']} seeds"
    table(rows, title, ("ablation", "ΔNLL", "least", "most", ""))
    if "content" in result:
        own, theirs = (f"{result['content'][key]:.0%}" for key in ("own_words", "plans_words"))
        say(
            f"a text written from the next pair's plan has {own} of the words of its own target, "
            f"and {theirs} of those of "
            "the target that the plan is of"
        )


def show_reconstruction(result: dict[str, Any]) -> None:
    """What comes back and what it costs, beside what it costs to lose nothing; and what a
    compressed context tells."""
    say(
        f"{result['model']} on {result['data']}: {result['windows']} windows of {result['window']} "
        "tokens"
    )
    keys = ("token_accuracy", "exact_match", "bleu", "chrf", "rouge_l", "length_ratio", "nll")
    rows = [(key, result[key], result["shuffled"][key]) for key in keys]
    table(rows, "written again from ids alone", ("measure", "value", "ids shuffled"))
    costs = {
        "target_rate": "rate",
        "concept_rate": "realised",
        "compression_ratio": "R",
        "bits_per_token": "bits/token",
        "bits_per_token_used": "used",
        "token_accuracy": "accuracy",
        "bleu": "BLEU-4",
        "nll": "NLL",
    }
    table(
        [tuple(one[key] for key in costs) for one in result["curve"] or [result]],
        "rate and distortion; R counts every id",
        (*costs.values(),),
    )
    rows = [(f"{one['name']}, {one['of']}", one["bits_per_token"]) for one in result["lossless"]]
    rows.append(("ids and what they leave open", result["bits_per_token_lossless"]))
    table(rows, "to lose nothing", ("coder", "bits/token"))
    for fault in sorted({one["fault"] for one in result["lossless"] if one["fault"]}):
        say(fault)
    found = result["continuation"]
    if found is None:
        say("no continuation: --context 0, or the text has no room for one")
    else:
        share = found["continuation_share"]
        note = (
            f"trained for it, continuation_share {share:g}"
            if share > 0
            else "never trained for it: continuation_share 0"
        )
        say(
            f"going on from {found['context']} tokens, the next {found['next_tokens']} of "
            f"{found['blocks']} texts ({note})"
        )
        keys = ("reader", "given", "length", "nll", "perplexity", "percent_over_whole")
        rows = [tuple(one[key] for key in keys) for one in found["given"]]
        table(rows, "continuation", (*keys[:3], "NLL", keys[4], "% over whole"))
    found = result["online"]
    if found is not None:
        keys = ("reader", "given", "length", "nll", "perplexity", "percent_over_whole")
        say(
            f"{found['model']} beside it, its dial at {found['target_rate']:.4g}: "
            f"{found['concept_rate']:.4g} concepts per "
            f"token realised, R {figure(found['compression_ratio'])} of every id; being online "
            "costs "
            f"{found['delta_nll']:+.4f} nats"
        )
        table(
            [tuple(one[key] for key in keys) for one in found["given"]],
            "what being online costs",
            (*keys[:3], "NLL", keys[4], "% over whole"),
        )
    found = result["questions"]
    if found is not None:
        keys = ("reader", "given", "length", "exact_match", "f1", "answer_nll")
        left = f", {found['skipped']} too long" if found["skipped"] else ""
        table(
            [tuple(one[key] for key in keys) for one in found["given"]],
            f"{found['questions']} questions{left}",
            keys,
        )


def show_speed(result: dict[str, Any]) -> None:
    keys = (
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "cache_bytes",
        "weight_bytes",
        "prefill_peak_bytes",
        "train_tokens_per_s",
        "train_peak_bytes",
    )
    rows = [(key, result["concept"][key], result["base"][key]) for key in keys]
    table(rows, f"{result['model']} beside its base", ("measure", "concept", "base"))
    ratios = (
        "prefill_speedup",
        "decode_speedup",
        "ceiling_decode_speedup",
        "cache_reduction",
        "prefill_memory_ratio",
        "train_step_ratio",
        "train_memory_ratio",
        "realised_rate",
    )
    table([(key, result.get(key)) for key in ratios], "ratios to the base", ("measure", "value"))


def show_compressor_speed(result: dict[str, Any]) -> None:
    """The medians, and behind each the least and the most over the rounds."""
    sides, rows = [result["concept"], result["base"]], []
    for name, both in (
        ("read", "compress, or one forward"),
        ("write", "decompress, or greedy decoding"),
    ):
        cells = []
        for one in sides:
            seconds, speed = one[f"{name}_seconds"], one[f"{name}_tokens_per_s"]
            least, most = (
                figure(speed * seconds["median"] / seconds[end]) for end in ("max", "min")
            )
            cells.append(f"{figure(speed)} ({least}–{most})")
        rows.append((f"{both}, tokens/s", *cells))
    rows += [(key, *(one[key] for one in sides)) for key in ("tokens_written", "weight_bytes")]
    settings = result["settings"]
    table(
        rows,
        f"{result['model']} beside its base, {settings['batch']} windows of {settings['window']} "
        "tokens",
        ("measure", "compressor", "base"),
    )
    rows = [
        (key, result[key], "–".join(f"{x:.3g}" for x in result.get(f"{key}_range", ())))
        for key in (
            "compress_base_forwards",
            "compress_base_forwards_no_logits",
            "decompress_speedup",
            "realised_rate",
            "compression_ratio",
        )
    ]
    table(rows, "ratios to the base", ("measure", "value", "min–max"))


def show_diagnosis(found: dict[str, Any]) -> None:
    """Findings first, then what was looked at in vain, then what could not be."""
    made = Table(
        title=f"{found['run']}: {len(found['findings'])} findings at step {found['step']}",
        title_justify="left",
        show_lines=True,
    )
    for name in ("finding", "seen", "try one of"):
        made.add_column(name, overflow="fold")
    for one in found["findings"]:
        where = "evaluate.json" if one["step"] is None else f"step {one['step']}"
        seen = [f"{key} {figure(value)}" for key, value in one["evidence"].items()]
        cells = (
            [one["rule"].upper(), one["advice"]],
            [f"{one['sign']}:", *seen, where],
            one["try"],
        )
        made.add_row(*("\n".join(cell) for cell in cells))
    if found["findings"]:
        out.print(made)
    else:
        say(f"{found['run']} is healthy at step {found['step']}")
    say(f"nothing found by: {', '.join(found['passed']) or '–'}")
    for one in found["unchecked"]:
        say(f"not checked: {one['rule']} ({one['because']})")
