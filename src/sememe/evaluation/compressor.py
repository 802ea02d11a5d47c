"""All figures of a saved compressor on a text: reconstruction, what other coders need, and what its
codes are worth as a context."""

from torch import Tensor

from sememe.data import heldout_blocks
from sememe.errors import CheckpointError
from sememe.evaluation.context import continuation, online_gap
from sememe.evaluation.inputs import refuse_trained
from sememe.evaluation.reconstruction import bins_line, lossless, reconstruction_figures
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Subject
from sememe.models.loading import check_rate, longest_text
from sememe.shards import TextShard
from sememe.texts import read_texts

CONTEXT = 512  # tokens that a text goes on from, at most
NEXT = 128  # tokens after them, at most


def evaluate_compressor(subject: Subject, data: str) -> Figures:
    """Every figure that there is; raises before anything is measured."""
    model, options = subject.model, subject.options
    if model.config.quantise < 1:
        raise CheckpointError(
            f"{subject.name} writes no codes yet: need a finished run. try: its command again"
        )
    model.config.beams = options.beams or model.config.beams
    blocks = subject.heldout(data, min_rows=2)
    ids_NT, context = continuation_blocks(subject, data)
    online = online_model(subject, data) if options.online else None
    bins = bins_model(subject, data) if options.bins else None
    base = subject.load_base()
    figures = reconstruction_figures(model, subject.tokenizer, blocks.ids_NT, subject.rates)
    figures["coders"] = lossless(base, model.bos, blocks)
    figures["coders"] += [bins_line(bins, blocks.ids_NT)] if bins else []
    continued = continuation(model, base, ids_NT, context, blocks.ids_NT.shape[1])
    is_trained = subject.recipe and model.config.continuation_share > 0
    continued["trained_context"] = subject.recipe["sequence_length"] // 2 if is_trained else None
    gap = None
    if online is not None:
        gap = {"model": options.online} | online_gap(online, model.bos, ids_NT, continued)
    return figures | {"continuation": continued, "online": gap}


def continuation_blocks(subject: Subject, data: str) -> tuple[Tensor, int]:
    """Blocks of a context and what follows it, and how long the context is: the longest up to 512
    tokens that text and positions allow."""
    tokens = len(TextShard(read_texts(data), subject.tokenizer, CONTEXT + NEXT))
    room = min(tokens, longest_text(subject.model.config))
    # A power of two, with as many tokens after it, or NEXT.
    context = 2 ** (min(CONTEXT, max(1, room // 2, room - NEXT)).bit_length() - 1)
    length = context + min(NEXT, context)
    blocks = heldout_blocks(data, subject.tokenizer, length, subject.options.tokens)
    return blocks.ids_NT, context


def bins_model(subject: Subject, data: str):
    """The compressor with bins of words that one is compared with. Raises CheckpointError for
    another model."""
    name = subject.options.bins
    refuse_trained(name, data)
    model = subject.load_other(name).model
    if getattr(model.config, "content", None) != "bins":
        raise CheckpointError(
            f"--bins {name} has no codes of bins: need a finished run of system: compressor with "
            "them. try: sememe train RECIPE content=bins"
        )
    model.config.beams = subject.options.beams or model.config.beams
    return model


def online_model(subject: Subject, data: str):
    """The online model that a compressor is compared with. Raises CheckpointError for one that
    writes no codes or is over another base, RecipeError for one that cannot run at the compressor's
    rate."""
    name = subject.options.online
    refuse_trained(name, data)
    # A merged model no longer knows its base.
    model = subject.load_other(name, merge=False).model
    own, config = subject.model.config, model.config
    if not hasattr(config, "split") or config.quantise < 1:
        raise CheckpointError(
            f"--online {name} is no online model that writes codes: need a finished run of system: "
            "online. try: sememe train RECIPE system=online"
        )
    if config.base_sha256 is None or config.base_sha256 != own.base_sha256:
        raise CheckpointError(
            f"--online {name} is over the base {config.base}, {subject.name} over {own.base}: need "
            "the same base for both. try: an online model over that one, not merged"
        )
    check_rate(config, subject.model.dial.rate, name)
    return model
