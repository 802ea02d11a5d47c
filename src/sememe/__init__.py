"""Sememe: a pretrained causal language model that works on concept tokens of its own.

`import sememe` makes `AutoModelForCausalLM.from_pretrained(RUN/model)` work. `sememe.compress` and
`sememe.decompress` are those of `sememe.codes`."""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The command line imports what each sub-command needs, so that `sememe --help` and `sememe report`
# start without torch.
if Path(sys.argv[0]).name != "sememe" and sys.argv[0] != "-m":
    import sememe.models  # noqa: F401  (registers the models with transformers)


def __getattr__(name: str):
    if name in ("compress", "decompress"):
        from sememe import codes

        return getattr(codes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
