"""An engine: one thread owns the model, and requests share its steps (docs/serving.md).

engine = Engine(model, tokenizer)
texts = engine.generate(["Once upon a time", "The old detective"], max_tokens=32)"""

from sememe.engine.loop import Answer, Engine, EngineStopped, QueueFull
from sememe.engine.opening import describe, open_engine
from sememe.engine.requests import Job, Progress, Request, Sampling, TokenLogprob, Turn
from sememe.engine.text import TextStream

__all__ = [
    "Answer",
    "Engine",
    "EngineStopped",
    "Job",
    "Progress",
    "QueueFull",
    "Request",
    "Sampling",
    "TextStream",
    "TokenLogprob",
    "Turn",
    "describe",
    "open_engine",
]
