"""Sememe: a pretrained causal language model that works on concept tokens of its own.

`import sememe` makes `AutoModelForCausalLM.from_pretrained(RUN/model)` work. `sememe.compress` and
`sememe.decompress` are those of `sememe.codes`."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

__version__ = "0.1.0"

AUTO = "transformers.models.auto.configuration_auto"


class _Registration(MetaPathFinder):
    """Hooks into transformers when its Auto classes are imported. To import the models here would
    import torch, and `sememe --help` and `sememe report` start without it."""

    def find_spec(self, name, path=None, target=None):
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: execute(module) or _hook(module.AutoConfig)
        return spec


def _hook(auto_config) -> None:
    """`AutoConfig.from_pretrained`, with which every Auto class begins, imports our models when it
    is first called: they register themselves."""
    original = auto_config.from_pretrained

    def from_pretrained(*args, **kwargs):
        auto_config.from_pretrained = original
        import sememe.models  # noqa: F401

        return original(*args, **kwargs)

    auto_config.from_pretrained = from_pretrained


if AUTO in sys.modules:
    _hook(sys.modules[AUTO].AutoConfig)
else:
    sys.meta_path.insert(0, _Registration())


def __getattr__(name: str):
    if name in ("compress", "decompress"):
        from sememe import codes

        return getattr(codes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
