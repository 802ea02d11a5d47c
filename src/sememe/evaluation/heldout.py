"""Text to measure a saved model on: never what it was trained on, in blocks that its base has
places for."""

from pathlib import Path

from sememe.data import TextBlocks, read_texts, text_blocks
from sememe.errors import DataError
from sememe.evaluation.figures import run_recipe
from sememe.evaluation.inputs import content, recorded
from sememe.models.loading import check_length, longest_text
from sememe.paths import source_sha256, usable

LENGTH = 512  # tokens of a block, where no run says what its model was trained on


def heldout_texts(model: str | Path, data: str) -> list[str]:
    """The documents of a text. Raises DataError where it cannot be read, or is the one that the run
    was trained on."""
    refuse_trained(model, data)
    return read_texts(data)


def refuse_trained(model: str | Path, data: str) -> None:
    """Raises DataError where a text is the one that the run was trained on, whatever its name: by
    content. The run keeps what its text was; one of an earlier version is compared with what stands
    at its path now."""
    recipe = run_recipe(model)
    if not recipe:
        return
    trained = recorded(usable(model)).get("train") or content(recipe["data"]["train"])
    if source_sha256(data) == trained["sha256"]:
        raise DataError(
            f"{data} is what {model} was trained on: need held-out text. try: "
            f"{recipe['data']['heldout']}"
        )


def heldout_blocks(
    model: str,
    loaded,
    tokenizer,
    texts: list[str],
    tokens: int,
    length: int | None = None,
    option: str = "sequence_length=",
) -> TextBlocks:
    """(N, T) blocks of `length` tokens, or as long as those of the run, or of 512. `option` is what
    a user says `length` with.

    Raises DataError for less than one block, or more tokens than the base has places for."""
    longest = longest_text(loaded.config)
    length = length or min(run_recipe(model).get("sequence_length", LENGTH), longest)
    check_length(longest, length, option)
    return text_blocks(texts, tokenizer, length, limit=max(tokens, length))
