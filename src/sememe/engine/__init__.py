"""An engine: one thread owns the model, and requests share its steps (docs/serving.md).

engine = Engine(model, tokenizer)
texts = engine.generate(["Once upon a time", "The old detective"], max_tokens=32)"""

from sememe.engine.loop import Answer, Engine, QueueFull
from sememe.engine.requests import Job, Progress, Request, Sampling, TokenLogprob

__all__ = [
    "Answer",
    "Engine",
    "Job",
    "Progress",
    "QueueFull",
    "Request",
    "Sampling",
    "TokenLogprob",
]
