"""A language model's answer as claims, and their check against the text of the paper."""

import json
import re

from sememe_digest.fulltext import INSTRUCTION, FullText
from sememe_digest.numbers import check_claim, missing_headlines
from sememe_digest.papers import SECTIONS, Claim, Entry, Summary

MAX_MISSING = 0.2  # of a summary's numbers, before it is asked for once more
MAX_CLAIM = 800  # characters: a claim is a sentence or two


def parse(response: str) -> Summary:
    """The claims of an answer, however loosely given, but for those that obey a paper."""
    try:
        content = str(json.loads(response)["choices"][0]["message"]["content"])
        content = re.sub(r"<think>.*?</think>", "", content, flags=re.S)
        answer = dict(json.loads(content[max(0, content.find("{")) : content.rfind("}") + 1]))
    except (LookupError, TypeError) as error:
        raise ValueError(f"no message in it: {response:.100}") from error
    summary = Summary()
    for field in ("sentence", *(name for names in SECTIONS.values() for name in names)):
        values = answer.get(field)
        for value in values if isinstance(values, list) else [values]:
            given = value if isinstance(value, dict) else {"text": value}
            texts = (str(given.get(key) or "")[:MAX_CLAIM] for key in ("text", "page", "quote"))
            text, page, quote = (" ".join(re.sub(r"[\0-\x1f\x7f]", " ", t).split()) for t in texts)
            if INSTRUCTION.search(text):
                summary.removed.append("a claim that obeys words to a language model")
            elif text:
                number = int(page) if page.isdecimal() else None
                summary.claims.append(Claim(field=field, text=text, page=number, quote=quote))
    if not summary.claims:
        raise ValueError("no claims in it")
    return summary


def check(summary: Summary, entry: Entry, text: FullText) -> str:
    """Compares a summary with its paper; what is wrong, in words for the model."""
    summary.removed = text.removed + summary.removed
    for claim in summary.claims:
        check_claim(claim, text.pages)
    summary.missing_headlines = missing_headlines(entry.abstract, summary.claims)
    missing, fault = summary.numbers("missing"), ""
    if len(missing) > MAX_MISSING * len(summary.numbers("missing", "found", "elsewhere")):
        fault = f"The paper does not contain these numbers: {', '.join(missing)}. "
    if summary.missing_headlines:
        fault += f"The abstract also states {', '.join(summary.missing_headlines)}."
    return fault
