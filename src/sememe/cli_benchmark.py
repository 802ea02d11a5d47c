"""The command `sememe benchmark`."""

import contextlib
from collections.abc import Iterator
from typing import Any

from sememe import arguments
from sememe.errors import SememeError, needs_extra
from sememe.locks import only_user
from sememe.paths import existing
from sememe.terminal import show_figures

OPTIONS = {
    "model": (arguments.Model, None),
    "prompt_tokens": (arguments.PromptTokens, None),
    "new_tokens": (arguments.TimedTokens, None),
    "batch": (arguments.Batch, None),
    "repeats": (arguments.Repeats, 5),
    "data": (arguments.Data, None),
    "dtype": (arguments.Dtype, "float32"),
    "rate": (arguments.Rate, None),
    "sweep": (arguments.Sweep, False),
    "serve": (arguments.Servers, None),
    "arrivals": (arguments.Arrivals, None),
    "seed": (arguments.Seed, 0),
}


def benchmark(model: arguments.Model, **options: Any) -> Iterator[dict[str, Any]]:
    """Speed and cache beside the unmodified base: one process, same dtype and kernel, alternating,
    medians; of one prompt, and of a batch in which rows are ragged and out of phase. Of a
    compressor: compressing beside one forward of the base over the same text, decompressing beside
    the base's own writing.

    Example: `sememe benchmark runs/demo --prompt-tokens 512 --new-tokens 128`

    A server under load, beside another one: `sememe benchmark --serve runs/demo --serve
    http://127.0.0.1:8001 --batch 16 --prompt-tokens 64-256 --data data/heldout.txt`"""
    servers = options.pop("serve")
    result = _of_servers(model, servers, options) if servers else _of_model(model, options)
    yield result
    show_figures(result, model or "")


def _of_model(model: str | None, options: dict[str, Any]) -> dict[str, Any]:
    _refuse(options, ("arrivals", "seed"), "is of requests to a server", "with --serve")
    if model is None:
        raise SememeError(
            "got no model: need one to time, or a server. try: sememe benchmark runs/demo"
        )
    prompt, new = (_single(options[name]) for name in ("prompt_tokens", "new_tokens"))
    taken = {name: options[name] for name in ("batch", "repeats", "dtype", "rate", "sweep")}
    folder = existing(model)
    is_run = folder is not None and (folder / "recipe.yaml").is_file()
    # Whoever works there now would change the timings, which are kept there.
    with only_user(folder) if is_run else contextlib.nullcontext():
        from sememe import measure

        settings = measure.Options(new_tokens=new or 64, **taken)
        return measure.benchmark(model, prompt, options["data"], settings)


def _of_servers(model: str | None, targets: list[str], options: dict[str, Any]) -> dict[str, Any]:
    with needs_extra("serve"):
        from sememe.evaluation.serving import Load, benchmark_servers
    from sememe.serving.settings import read_key

    _refuse(options, ("rate", "sweep", "dtype"), "is of a model in this process", "without --serve")
    load = Load(
        requests=options["batch"] or 16,
        prompt_tokens=options["prompt_tokens"] or (256, 256),
        new_tokens=options["new_tokens"] or (64, 64),
        arrivals=options["arrivals"],
        repeats=options["repeats"],
        seed=options["seed"],
        key=read_key(None),
    )
    return benchmark_servers([model, *targets] if model else targets, load, options["data"])


def _refuse(options: dict[str, Any], names: tuple[str, ...], why: str, instead: str) -> None:
    for name in names:
        if options[name] not in (OPTIONS[name][1], []):
            raise SememeError(f"got --{name}, which {why}: need another option. try: {instead}")


def _single(lengths: tuple[int, int] | None) -> int | None:
    if lengths and lengths[0] < lengths[1]:
        raise SememeError(
            f"got lengths from {lengths[0]} to {lengths[1]}: need one, since rows of one batch are "
            "timed. try: a range with --serve"
        )
    return lengths and lengths[0]


arguments.expand(benchmark, OPTIONS)
