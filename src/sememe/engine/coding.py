"""A compressor's works: texts → codes → texts, batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sememe.codes import Codes, Uncoded, code, trained_window, writer_of
from sememe.engine.requests import Progress
from sememe.engine.works import Steps, Works
from sememe.errors import CodesError, DataError
from sememe.models.compressor.model import BEAMS_AT_ONCE
from sememe.models.loading import check_rate, longest_text
from sememe.models.stepping import slot_bytes


@dataclass(frozen=True)
class Compress:
    """Texts that were cut into windows, which get their concepts."""

    uncoded: Uncoded
    prompt: Sequence[int]
    """The token ids of all windows."""
    rate: float

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str], window: int, rate: float) -> "Compress":
        """Raises DataError for what is no text."""
        uncoded = Uncoded.cut(tokenizer, texts, window)
        return cls(uncoded, [i for x in uncoded.windows for i in x.concepts], rate)


@dataclass(frozen=True)
class Decompress:
    """Codes of this model; comes to the token ids of each window."""

    codes: Codes
    prompt: Sequence[int] = ()


class CompressorWorks(Works):
    """Windows that go together, one batch after another."""

    def __init__(self, model: PreTrainedModel, *limits: Any):
        super().__init__(model, *limits)
        self.writer = writer_of(model)
        self.rate = model.dial.rate
        self.window = trained_window(model.config)

    @property
    def longest(self) -> int:
        """Tokens of a window."""
        return longest_text(self.model.config)

    def check(self, request: Compress | Decompress) -> None:
        config = self.model.config
        if isinstance(request, Compress):
            check_rate(config, request.rate, "the model")
        elif not isinstance(request, Decompress):
            raise DataError(
                "this model is a compressor, which writes a text again and none of its own: need "
                "texts or codes. try: Compress"
            )
        elif not request.codes.written_by(self.writer):
            raise CodesError(
                "these codes are of another model: need those that this one wrote. try: to "
                "compress the text again"
            )
        else:
            request.codes.check_windows(config)

    def steps(self, request: Compress | Decompress) -> Steps:
        return self._compress(request) if isinstance(request, Compress) else self._write(request)

    def _compress(self, request: Compress) -> Steps:
        for windows in request.uncoded.batches:
            code(self.model, windows, request.rate)
            concepts = sum(len(window.concepts) for window in windows)
            yield Progress(read=sum(window.tokens for window in windows), concepts=concepts)
        yield Progress(finish="stop")

    def _write(self, request: Decompress) -> Steps:
        rows = [window.concepts for window in request.codes.windows]
        lengths = self.model.lengths(rows)
        texts: list[list[int]] = [[] for _ in rows]
        # Those of about one length go together.
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        while order:
            part = order[: self._together(lengths[order[-1]])]
            order = order[len(part) :]
            written = self.model.decompress([rows[n] for n in part])
            for n, tokens in zip(part, written, strict=True):
                texts[n] = tokens
            yield Progress(written=sum(map(len, written)))
        yield Progress(result=texts, finish="stop")

    def _together(self, tokens: int) -> int:
        """Windows that are written at the same time: as many as the cache may hold beams of."""
        config = self.model.config
        layers = config.get_text_config().num_hidden_layers
        window = max(1, tokens) * layers * slot_bytes(self.model) * config.beams
        return int(max(1, min(BEAMS_AT_ONCE // config.beams, self.cache_bytes / window)))
