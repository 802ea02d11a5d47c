"""Feeds and listing pages: nothing lost, nothing misread, a stale list told from a new one."""

from datetime import date

import pytest

from sememe_digest import DigestError
from sememe_digest.config import Config
from sememe_digest.feeds import Feed, read_feed, read_listing, stale_since, union
from sememe_digest.fulltext import authors, to_text
from tests.stub import DATA, feed_xml

EDGE = (DATA / "edge_cs.LG.xml").read_bytes()
LISTING = (DATA / "listing_cs.AI_2026-08-12_trimmed.html").read_bytes()


def config(*categories: str, **keys) -> Config:
    return Config(categories=categories or ["cs.LG"], terms=["training"], **keys)


def test_hostile_items_are_read_to_their_last_word():
    feed = read_feed(EDGE, "cs.LG")
    assert len(feed.papers) == 9 and feed.date == date(2026, 2, 18)
    assert feed.faults == ["cs.LG: 1 without an id or an announce type"]
    first = feed.papers[0]
    for words in ("For $n<k$ we show that attention", "3 > 2 times", "<b>bold</b> stay", "AT&T"):
        assert words in first.abstract
    assert first.abstract.endswith("\nA second paragraph names quantization.")
    by_id = {paper.id: paper for paper in feed.papers}
    assert by_id["hep-ex/0307015"].version == 1 and by_id["2601.90004"].version == 3
    assert by_id["2602.90007"].abstract == "Only an abstract about efficient kernels."
    assert by_id["2602.90008"].abstract == "" and by_id["2602.90002"].primary == "cs.CL"


def test_names_and_affiliations_are_kept_apart():
    people = authors(read_feed(EDGE, "cs.LG").papers[0].creator)
    assert people == [
        {"name": "André Müller", "affiliation": "Univ. Bonn, Germany"},
        {"name": "Balázs Kulcsár", "affiliation": ""},
        {"name": "Gökçe Aydos", "affiliation": "Bilkent, ODTÜ"},
    ]
    names = [person["name"] for person in authors("NVIDIA,  :, Ann Bee (A (B, C), D), Cy")]
    assert names == ["NVIDIA", "Ann Bee", "Cy"]


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        ("AT&T saw 70\\% and 12% gains", "AT&T saw 70% and 12% gains"),
        ("for $n<k$ \\textsc{AllMem} is 2$\\times$ faster", "for n<k AllMem is 2× faster"),
        ("plain words", "plain words"),
        ("unbalanced $x and {y", None),
        ("\\frac", None),
    ],
)
def test_tex_becomes_text(tex, text):
    assert to_text(tex) == (text or to_text(tex)) and to_text(tex)


def test_atom_is_read_like_rss():
    feed = read_feed((DATA / "atom_cs.AI_2025-08-20_trimmed.xml").read_bytes(), "cs.AI")
    assert feed.date == date(2025, 8, 20) and len(feed.papers) == 7 and not feed.faults
    paper = feed.papers[0]
    assert (paper.id, paper.version, paper.type) == ("2508.13426", 1, "cross")
    assert paper.categories == ["cs.CL", "cs.AI"] and paper.abstract.startswith("As large")
    assert paper.creator.startswith("Chunhua Liu, ")


def test_a_holiday_is_a_feed_without_papers():
    feed = read_feed((DATA / "rss_physics_2025-12-31_empty.xml").read_bytes(), "physics")
    assert feed.date == date(2025, 12, 31) and feed.papers == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ((DATA / "error_cs.XX.xml").read_bytes(), "Bad subject class 'XX'"),
        (EDGE[:3000], "no whole feed"),
        (b"<!doctype html><html><p>Sorry", "HTML"),
        (b"<html><title>Sorry</title></html>", "HTML"),
        (b"", "no whole feed"),
        (b"<rss><channel><title>x</title></channel></rss>", "no whole feed"),
    ],
)
def test_what_is_no_feed_is_said_in_one_sentence(body, words):
    with pytest.raises(DigestError, match=words) as caught:
        read_feed(body, "cs.XX")
    assert "\n" not in str(caught.value) and "try:" in str(caught.value)


def test_a_paper_has_its_strongest_type_over_all_feeds():
    day = date(2026, 2, 18)
    edge = read_feed(EDGE, "cs.LG")
    alone = {paper.id for paper in union([edge], day, config("cs.LG"))}
    assert alone == {"2602.90001", "2602.90007", "2602.90008", "2602.90009"}
    both = union([edge], day, config("cs.LG", "cs.CL"))
    found = {paper.id: paper for paper in both}
    # Its own feed is missing: the cross-list in another one is enough.
    assert found["2602.90002"].primary == "cs.CL" and found["2602.90002"].type == "new"
    assert "2602.90003" not in found
    crossed = {p.id: p.type for p in union([edge], day, config("cs.LG", types=["new", "cross"]))}
    assert crossed["2602.90003"] == "cross" and "2601.90004" not in crossed
    assert {"2602.90001", "2602.90002"} <= {p.id for p in union([edge], day, config("cs"))}


def test_an_old_paper_that_is_cross_listed_late_is_not_new():
    items = [
        {"id": "2501.00001", "type": "cross", "classes": ["cs.CL", "cs.LG"]},
        {"id": "2512.00002", "type": "cross", "classes": ["cs.CL", "cs.LG"]},
        {"id": "2601.00003", "type": "cross", "classes": ["cs.CL", "cs.LG"], "version": 2},
    ]
    feed = read_feed(feed_xml(items), "cs.LG")
    found = union([feed], date(2026, 1, 5), config("cs.CL", "cs.LG"))
    assert [paper.id for paper in found] == ["2512.00002"]


def test_half_of_the_new_ids_make_a_feed_stale():
    items = [{"id": f"2602.0000{n}"} for n in range(4)] + [{"id": "2601.1", "type": "replace"}]
    feed = read_feed(feed_xml(items), "cs.LG")
    seen = {
        "2602.00000": date(2026, 2, 13),
        "2602.00001": date(2026, 2, 13),
        "2601.1": date(2026, 1, 1),
    }
    assert stale_since(feed, seen) == date(2026, 2, 13)
    assert stale_since(feed, {"2602.00000": date(2026, 2, 13)}) is None
    assert stale_since(Feed(feed.date, [], []), seen) is None


def test_a_listing_page_gives_the_same_papers():
    feed = read_listing(LISTING, "cs.AI")
    assert feed.date == date(2026, 8, 12)
    assert [paper.type for paper in feed.papers] == ["new"] * 2 + ["cross"] * 2 + ["replace"] * 2
    first, second, crossed, *_ = feed.papers
    assert (first.id, first.version, first.creator) == ("2608.09949", 1, "Serge Kernbach")
    assert first.title == "Closed-Loop LLM Co-Pilots for Digital Agriculture"
    assert first.categories == ["cs.AI", "physics.bio-ph"] and "67.9% energy" in first.abstract
    assert "policy's action" in second.abstract and second.categories == ["cs.AI", "cs.LG"]
    assert (crossed.id, crossed.version, crossed.primary) == ("2505.11635", 2, "cs.LG")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"2 of 2 entries", b"2 of 79 entries", "2 of 79 new"),
        (b"list-title", b"listtitle", "0 of 2 new"),
        (b"Showing new listings", b"Recent submissions", "no listing page"),
    ],
)
def test_a_listing_page_that_does_not_fit_its_counts_is_refused(old, new, words):
    with pytest.raises(DigestError, match=words):
        read_listing(LISTING.replace(old, new), "cs.AI")
