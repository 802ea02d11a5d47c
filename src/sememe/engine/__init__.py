"""An engine: one thread owns the model, and requests share its steps (docs/serving.md).

engine = Engine(model, tokenizer)
texts = engine.generate(["Once upon a time", "The old detective"], max_tokens=32)"""

from sememe.engine.by_name import describe, open_engine
from sememe.engine.coding import Compress, Decompress
from sememe.engine.loop import Answer, Engine, EngineStopped, QueueFull
from sememe.engine.requests import (
    Iteration,
    Job,
    Progress,
    Request,
    Sampling,
    TokenLogprob,
    Unserved,
)
from sememe.engine.text import TextStream

__all__ = [
    "Answer",
    "Compress",
    "Decompress",
    "Engine",
    "EngineStopped",
    "Iteration",
    "Job",
    "Progress",
    "QueueFull",
    "Request",
    "Sampling",
    "TextStream",
    "TokenLogprob",
    "Unserved",
    "describe",
    "open_engine",
]
