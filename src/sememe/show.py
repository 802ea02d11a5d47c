"""Text on a terminal with its concepts: each segment in a colour, the id that closed it behind
it."""

from collections.abc import Sequence

from rich.console import Console
from transformers.generation.streamers import BaseStreamer

from sememe.console import write
from sememe.detokenize import Detokenizer, decode

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


def colour(concept: int) -> str:
    """The same id has the same colour in every text."""
    return COLOURS[(concept * 2654435761 >> 8) % len(COLOURS)]


class ConceptStreamer(BaseStreamer):
    """Prints the prompt, and tokens as they come. With `cache` in segments: the concept of a token
    is known one step later, when the model has read it."""

    def __init__(self, tokenizer, console: Console, prompt: str, cache=None):
        self.console = console
        self.prompt = prompt
        self.cache = cache
        self.text = Detokenizer(tokenizer, skip_special_tokens=cache is None)
        self.pieces: list[str] = []
        self.seen = 0
        """Tokens whose concept is known."""
        self.closed = 0
        """Those of them in segments that are printed."""

    def put(self, value) -> None:
        new = [self.text.add(token) for token in value.flatten().tolist()]
        if self.cache is None:
            # The prompt comes first, all at once; its tokens need not decode to the very same text.
            write("".join(new) if self.pieces else self.prompt, console=self.console)
            self.pieces += new
            return
        self.pieces += new
        read = self.cache.concept_ids[0].tolist()
        while self.seen < len(read):
            self.seen += 1
            if read[self.seen - 1] != -1:
                self._close(read[self.seen - 1])

    def _close(self, concept: int) -> None:
        text = "".join(self.pieces[self.closed : self.seen])
        write(text, "dim" if concept < 0 else colour(concept), self.console)
        write("⟨sink⟩" if concept < 0 else f"⟨{concept}⟩", "dim", self.console)
        self.closed = self.seen

    def end(self) -> None:
        tail = [] if self.cache is None else self.pieces[self.closed :]
        write("".join([*tail, self.text.rest()]), "" if self.cache is None else "dim", self.console)
        write("\n", console=self.console)


def generate_text(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    show_concepts: bool,
    console: Console,
    base: str | None = None,
    rate: float | None = None,
    show_plan: bool = False,
    edits: list[str] | None = None,
    budget: Sequence[int] = (),
) -> dict:
    """Streams a continuation and returns prompt, text, and (for an online model) the concept id of
    every token that the model read: all but the last new one. Of a planner: see
    `show_plan.write_planned`.

    Raises:
        DataError: an empty prompt, one that is not UTF-8, or one longer than the model's context.
        CheckpointError: `show_concepts` for a model without concepts."""
    import torch

    from sememe.data import check_text
    from sememe.errors import CheckpointError, DataError
    from sememe.models.compressor import CompressorForCausalLM
    from sememe.models.loading import load_model
    from sememe.models.online import OnlineForCausalLM
    from sememe.models.planner import PlannerForCausalLM
    from sememe.show_plan import check_options, write_planned

    if temperature < 1e-6:  # colder is greedy, and logits divided by it overflow
        temperature = 0.0
    if not check_text(prompt, "the prompt").strip():
        raise DataError(
            'the prompt is empty: need some text to go on from. try: --prompt "Once upon a time"'
        )
    loaded, tokenizer = load_model(model, base=base, rate=rate)
    if isinstance(loaded, CompressorForCausalLM):
        raise CheckpointError(
            f"{model} is a compressor, which writes a text again and none of its own: need a "
            "language model. "
            "try: sememe compress and sememe decompress"
        )
    planner = isinstance(loaded, PlannerForCausalLM)
    check_options(model, planner, show_concepts, show_plan, edits or [], top_p, budget)
    if planner:
        if budget:
            loaded.limit(budget)
        return write_planned(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens,
            temperature,
            seed,
            show_plan,
            edits or [],
            console,
        )
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(loaded.device)
    longest = loaded.config.get_text_config().max_position_embeddings
    if ids.shape[1] + max_new_tokens > longest:
        raise DataError(
            f"the prompt has {ids.shape[1]} tokens and {max_new_tokens} are to follow: need at "
            f"most {longest} together. "
            "try: a shorter prompt or a smaller --max-new-tokens"
        )
    online = isinstance(loaded, OnlineForCausalLM)
    if show_concepts and not online:
        raise CheckpointError(
            f"{model} has no concepts to show: need a run of system: online. try: without "
            "--show-concepts"
        )
    cache = loaded.new_cache(1) if online else None
    streamer = ConceptStreamer(tokenizer, console, prompt, cache if show_concepts else None)
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    made = loaded.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=pad,
        **({"cache": cache} if online else {}),
        **sampling,
    )
    # Behind the prompt: alone, the first new token may lose its space.
    text = decode(tokenizer, made[0], skip_special_tokens=True)[
        len(decode(tokenizer, ids[0], skip_special_tokens=True)) :
    ]
    result = {"prompt": prompt, "text": text, "new_tokens": made.shape[1] - ids.shape[1]}
    if online:
        result |= {
            "concept_ids": cache.concept_ids[0].tolist(),
            "concept_rate": float(cache.concepts[0] / cache.tokens[0]),
        }
    return result
