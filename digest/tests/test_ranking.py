"""Terms, exclusions and interests: scores as documented, and every score explained."""

from datetime import UTC, date, datetime

import pytest

from sememe_digest.config import Config
from sememe_digest.daily import Run
from sememe_digest.feeds import union
from sememe_digest.papers import Archive, Paper
from sememe_digest.ranking import ENDING, needles, normalise, rank, similarities
from tests.stub import DAY, PAGES, SEED


def score(title: str, abstract: str = "", **keys) -> float:
    paper = Paper(id="2602.00001", title=title, abstract=abstract)
    return rank([paper], Config(categories=["cs.LG"], **keys))[0].score


@pytest.mark.parametrize(
    ("term", "text", "hit"),
    [
        ("LLM", "many LLMs", True),
        ("RL", "early world", False),
        ("RL", "RL-based", True),
        ("box", "boxes", True),
        ("efficiency", "efficiencies", True),
        ("quantiz*", "Quantized", True),
        ("quantiz*", "dequantized", False),
        ('"state space"', "State-space models", True),
        ("state space", "state of space", False),
        ("KV cache", "KV caches", True),
    ],
)
def test_words_prefixes_and_phrases(term, text, hit):
    assert any(needle in normalise(text) for needle in needles(term, "word")) is hit


def test_the_documented_score():
    assert score("Fast training", "training of cats", terms=["training", "cat"]) == 2.5
    assert score("Fast training", terms=[{"training": 2}, {"fast": -1}]) == 1.5
    assert score("Stories of early worlds", terms=["RL"], match="substring") == 1.5
    assert score("Stories of early worlds", terms=["RL"]) == 0


def test_exclusion_looks_where_it_is_told():
    paper = Paper(id="2602.00001", title="Training", abstract="as in peer review")
    for where, excluded in (("title", None), ("title+abstract", "review")):
        keys = {"terms": ["training"], "exclude": ["review"], "exclude_in": where}
        (entry,) = rank([paper], Config(categories=["cs.LG"], **keys))
        assert entry.excluded == excluded


def test_scores_of_a_real_day_with_nothing_lost(tmp_path):
    config = Config(**SEED)
    code, found = Run(config, Archive(tmp_path / "site"), DAY).run(datetime.now(UTC), False)
    assert code == 0
    scores = {entry.versioned_id: entry.score for entry in found.entries}
    expected = {row["arxiv_id"]: row for row in PAGES["expected"]}
    above = {name: row["score"] for name, row in expected.items() if not row["at_the_cut"]}
    assert len(above) == 25 and above.items() <= scores.items()
    assert len(scores) == 30 and scores.keys() <= expected.keys() and found.tied_out == 1
    assert found.entries[0].id == "2602.14452" and found.entries[0].score == 11.0
    assert (found.entries[0].primary, found.entries[0].type) == ("cs.LG", "new")


def test_interests_find_a_subject_without_its_words():
    query = "We compress long contexts into gist tokens, so that decoding needs a smaller cache."
    texts = [
        "Compressing contexts into a few tokens shrinks the cache of a decoder",
        "A survey of bird songs in alpine meadows",
        "Decoding with compressed caches on long inputs",
        "Fairness of credit scores under changing laws",
    ]
    near = similarities(query, texts)
    assert min(near[0], near[2]) > 2 * max(near[1], near[3])
    assert similarities(query, []) == [] and similarities("zebra", texts) == [0, 0, 0, 0]
    assert ENDING.sub("", "compress compressed compression") == "compress compress compress"


def test_interests_and_score_order_together():
    papers = [
        Paper(id="2602.00001", title="Training of cats", abstract="Nothing else."),
        Paper(id="2602.00002", title="Gist tokens", abstract="Contexts as gist tokens."),
        Paper(id="2602.00003", title="Training of gist tokens", abstract="Contexts in training."),
        Paper(id="2602.00004", title="Rivers", abstract="Water."),
    ]
    keys = {"categories": ["cs.LG"], "terms": ["training"], "interests": "gist tokens of contexts"}
    ranked = rank(papers, Config(**keys))
    assert (ranked[0].id[-1], ranked[-1].id[-1]) == ("3", "4")
    assert ranked[0].similarity > 0.3 and ranked[-1].similarity == 0


def test_ties_keep_the_order_of_the_feeds():
    papers = [Paper(id=f"2602.0000{n}", title="Training", abstract="") for n in (3, 1, 2)]
    ranked = rank(papers, Config(categories=["cs.LG"], terms=["training"]))
    assert [entry.id[-1] for entry in ranked] == ["3", "1", "2"]
    assert union([], date(2026, 2, 17), Config(**SEED)) == []
