"""All figures of a saved compressor on a text: reconstruction, lossless coding cost, and what its
codes are worth as a context."""

from torch import Tensor

from sememe.data import read_texts, token_blocks
from sememe.errors import CheckpointError, DataError
from sememe.evaluation.answers import answer_questions, read_questions
from sememe.evaluation.context import continuation, online_gap
from sememe.evaluation.inputs import refuse_trained
from sememe.evaluation.reconstruction import lossless, reconstruction_figures
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Subject
from sememe.models.loading import check_rate, longest_text

CONTEXTS = tuple(2**power for power in range(9, 0, -1))  # tokens that a text goes on from
NEXT = 128  # tokens after them, at most


def evaluate_compressor(subject: Subject, data: str) -> Figures:
    """Every figure that there is; raises before anything is measured."""
    model, tokenizer, options = subject.model, subject.tokenizer, subject.options
    if model.config.quantise < 1:
        raise CheckpointError(
            f"{subject.name} writes no codes yet: need a finished run. try: its command again"
        )
    questions = read_questions(options.questions) if options.questions else []
    model.config.beams = options.beams or model.config.beams
    blocks = subject.heldout(data, min_rows=2)
    window = blocks.ids_NT.shape[1]
    online = online_model(subject, data) if options.online else None
    continued = continuation_blocks(subject, data)
    if online is not None and continued is None:
        raise DataError(
            f"--online compares how a text goes on, and {data} has no room for a context and what "
            "follows it: need more text. try: without --online"
        )
    base = subject.load_base()
    figures = reconstruction_figures(model, tokenizer, blocks.ids_NT, subject.rates)
    figures["lossless"] = lossless(base, model.bos, blocks)
    figures |= dict.fromkeys(("continuation", "online", "questions"))
    if continued is not None:
        figures["continuation"] = continuation(model, base, *continued, window)
        length = subject.recipe.get("sequence_length")
        is_trained = length is not None and model.config.continuation_share > 0
        figures["continuation"]["trained_context"] = length // 2 if is_trained else None
    if online is not None:
        gap = online_gap(online, model.bos, continued[0], figures["continuation"])
        figures["online"] = {"model": str(options.online)} | gap
    if questions:
        answers = answer_questions(model, base, tokenizer, questions, window)
        figures["questions"] = {"data": str(options.questions)} | answers
    return figures


def continuation_blocks(subject: Subject, data: str) -> tuple[Tensor, int] | None:
    """Blocks of a context and what follows it, and how long the context is: the longest up to 512
    tokens that text and positions allow; None where the text has no room."""
    texts, longest = read_texts(data), longest_text(subject.model.config)
    for context in CONTEXTS:
        length = context + min(NEXT, context)
        try:
            limit = max(subject.options.tokens, length)
            if length <= longest:
                return token_blocks(texts, subject.tokenizer, length, limit=limit), context
        except DataError:
            continue  # the text is shorter
    return None


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
