"""Conversations → rows through the base's own chat template, learned and measured at answers alone:
the text of each assistant turn, and the token behind it, which ends it."""

import itertools
import re
from typing import Any

import numpy as np
from jinja2 import TemplateError

from sememe.errors import DataError, reason
from sememe.paths import locate
from sememe.texts import byte_counts, check_text, encoder, read_rows

MARK = "\ue000{}\ue001"  # in the place of an answer: characters of no script
MARKS = re.compile(MARK.format(r"\d+"))
Message = dict[str, str]


def chat_rows(source: str, tokenizer, length: int, limit: int) -> list[tuple]:
    """(ids, bytes, counted) of each conversation with an answer in its first `length` tokens, until
    there are `limit` tokens. Raises DataError: a base without a chat template, or one that changes
    what answers say."""
    _, name, field = locate(source)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{name} has conversations, and this base has no chat template: need a base that was "
            "trained on chats, or text. try: a base whose name ends in Instruct"
        )
    encode, rows, total = encoder(tokenizer), [], 0
    for place, (messages,) in read_rows(name, (field,), convert=_messages):
        text, spans = rendered(messages, tokenizer, place)
        (encoding,) = encode([text])
        from_n, to_n = np.array(encoding.offsets).T
        answer_n, counted_n = np.zeros((2, len(from_n)), bool)
        for start, end in spans:
            answer_n |= (to_n > start) & (from_n < end)
            counted_n[np.flatnonzero(from_n >= end)[:1]] = True
        counted_n |= answer_n
        bytes_n = byte_counts(text, encoding.offsets) * answer_n
        row = tuple(x[:length] for x in (np.array(encoding.ids), bytes_n, counted_n))
        if row[2][1:].any():  # the first token of a row is never predicted
            rows.append(row)
            total += len(row[0])
        if total >= limit:
            break
    if not rows:
        raise DataError(
            f"{source} has no answer within {length} tokens: need one to learn. try: longer rows"
        )
    return rows


def rendered(messages: list[Message], tokenizer, place: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as its template writes it, and where the answers stand in it.

    Found by a second rendering with marks in their places: a template may treat earlier answers
    otherwise than the last one, so no rendering has to begin as that of fewer messages does."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    numbers = itertools.count()
    with_marks = [
        message | {"content": MARK.format(next(numbers))}
        if message["role"] == "assistant"
        else message
        for message in messages
    ]
    try:
        text, between = (
            tokenizer.apply_chat_template(x, tokenize=False) for x in (messages, with_marks)
        )
    except (TemplateError, TypeError, ValueError) as fault:
        raise DataError(
            f"{place} does not fit the base's chat template ({reason(fault)}): need messages as it "
            "knows them. try: drop that row"
        ) from fault
    parts, spans, end = MARKS.split(between), [], 0
    for part, answer in zip(parts, answers, strict=False):
        start = end + len(part)
        end = start + len(answer)
        spans.append((start, end))
    whole = "".join(itertools.chain(*itertools.zip_longest(parts, answers, fillvalue="")))
    if len(parts) != len(answers) + 1 or whole != text:
        raise DataError(
            f"{place} has answers that the base's chat template changes, so that it is not known "
            "where they stand: need them as they are. try: drop that row, or another base"
        )
    return text, spans


def _messages(row: Any, field: str, place: str) -> list[Message]:
    """The messages of a row, without white space around them, which many templates drop."""
    messages = row.get(field) if isinstance(row, dict) else None
    try:
        return [
            {"role": x["role"], "content": check_text(x["content"].strip(), place)}
            for x in messages
        ]
    except (TypeError, LookupError, AttributeError) as fault:
        raise DataError(
            f"{place} has no conversation in {field!r}: need a list of messages with role and "
            "content, both text. try: drop that row"
        ) from fault
