"""JSON as it is taken from a client: UTF-8, not deep, no NaN, no key twice, no half characters."""

import json
import re
from typing import Any

from sememe.serving.errors import ApiError, bad

STRINGS = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.S)


def parse(body: bytes, depth: int) -> Any:
    """The value.

    Raises:
        ApiError: 400, with a sentence that repeats nothing of the body."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused(f"byte {error.start} of the body is not UTF-8", "UTF-8") from error
    # Before it is parsed, since the parser itself recurses.
    if nesting(text) > depth:
        raise refused("the body is nested too deeply", f"at most {depth} levels")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise refused(f"the body is not JSON at character {error.pos}", "JSON") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise refused("the body holds a number that is none", "finite numbers") from error
    if not isinstance(value, dict):
        raise refused("the body is JSON and no object", "an object with fields")
    if "\\u" in text:
        check_characters(value)
    return value


def refused(what: str, need: str) -> ApiError:
    return bad(None, f"{what}: need {need}. try: the client's own JSON writer", "invalid_json")


def nesting(text: str) -> int:
    """How deep brackets stand within each other, outside of strings."""
    deepest = level = 0
    for mark in re.findall(r"[\[\]{}]", STRINGS.sub("", text)):
        level += 1 if mark in "[{" else -1
        deepest = max(deepest, level)
    return deepest


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise refused("an object has a key twice", "each once")
    return fields


def no_constant(name: str) -> Any:
    raise refused("a number is NaN or infinite", "finite numbers")


def check_characters(value: Any) -> None:
    """Escapes may hold halves of a character, or NUL."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and re.search("[\0\ud800-\udfff]", part):
            raise refused("a string holds NUL or half of a surrogate pair", "whole characters")
