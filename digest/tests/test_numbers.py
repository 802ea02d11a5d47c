"""Numbers of summaries: what the paper does not contain is marked, what it does is not."""

import random

import pytest

from sememe_digest.numbers import check_claim, missing_headlines, values
from sememe_digest.papers import Claim
from tests.stub import PAGES

FORMS = [
    lambda n: (f"{n + 1000:,}.5", f"{n + 1000:,}.5"),
    lambda n: (f"{n / 7:.2f}\\%", f"{n / 7:.2f}%"),
    lambda n: (f"{n / 9:.2f}×", f"{n / 9:.2f}x"),
    lambda n: (f"{n / 9:.2f}x", f"{n / 9:.2f} ×"),
    lambda n: (f"−{n / 1000:.3f}", f"-{n / 1000:.3f}"),
    lambda n: (f"{n}e-7", f"{n} × 10^{{-7}}"),
    lambda n: (f"{n} %", f"{n}%"),
]
BREAKS = ["reaches {} here", "reaches\n{} here", "is inter-\nrupted by {}\nhere", "({})"]


def planted(count: int, seed: int):
    """Numbers as a claim writes them and as another text does, each in turn in every form."""
    draw = random.Random(seed)
    for index in range(count):
        yield FORMS[index % len(FORMS)](draw.randrange(101, 999))


def state(text: str, pages: list[str], page: int | None = 1) -> list[str]:
    claim = Claim(field="method", text=text, page=page, quote="")
    check_claim(claim, pages)
    return [number["state"] for number in claim.numbers]


def test_of_a_hundred_right_numbers_none_is_marked():
    for index, (stated, printed) in enumerate(planted(100, 1)):
        page = f"Our model {BREAKS[index % len(BREAKS)].format(printed)} on 8 GPUs."
        assert state(f"It reaches {stated}.", [page]) == ["found"], (stated, page)
        # On another page it is found too, and that page is named.
        assert state(f"It reaches {stated}.", ["Nothing.", page], page=1) == ["elsewhere"]


def test_of_a_hundred_wrong_numbers_all_are_marked():
    right = [printed for _, printed in planted(100, 2)]
    pages = ["Nothing.", "\n".join(f"Our model reaches {text} on 8 GPUs." for text in right)]
    present = values(pages[1])
    wrong = [s for s, _ in planted(300, 3) if not values(s) & present][:100]
    assert len(wrong) == 100
    for stated in wrong:
        assert state(f"It reaches {stated}.", pages) == ["missing"], stated


@pytest.mark.parametrize(
    ("claim", "page", "states"),
    [
        ("In 2024 they saw it", "nothing", []),
        ("1. It is shown in Table 3 and Fig. 2", "nothing", []),
        ("2.23× faster", "2.24 times faster", ["missing"]),
        ("it falls by −0.46", "it falls by 0.46", ["missing"]),
        ("it changes by 0.46", "it changes by − 0.46", ["found"]),
        ("Llama-3.1-8B on A100", "Llama-3.1-8B, A100", ["found", "found", "found"]),
        ("between 5 and 10", "in 5–10 runs", ["found", "found"]),
        ("it has 70.0 points", "70 points", ["found"]),
        ("1,234 papers", "1, 234 and 5", ["missing"]),
    ],
)
def test_which_numbers_are_looked_at(claim, page, states):
    assert state(claim, [page]) == states


def test_a_quote_is_compared_without_blanks_hyphenation_and_ligatures():
    page = "The eﬃcient de-\ncoder runs\n twice as fast, we find."
    for quote, found in (("efficient decoder runs twice", True), ("runs thrice as fast", False)):
        claim = Claim(field="method", text="It is fast.", page=1, quote=quote)
        check_claim(claim, [page])
        assert claim.quote_found is found


def test_headlines_of_published_summaries():
    flagged = {}
    for summary in PAGES["summaries"]:
        claim = Claim(field="method", text="; ".join(summary["numbers"]), page=None, quote="")
        if missing := missing_headlines(summary["abstract"], [claim]):
            flagged[summary["id"]] = missing
    assert len(PAGES["summaries"]) == 45 and len(flagged) <= 7
    assert flagged["2602.05191"] == ["1.8x", "1.3x"]
