"""Signals: rules that read labels off texts, and linear probes that read them off features."""

import math
from collections import Counter

import pytest
import torch

from sememe.errors import DataError
from sememe.models.planner import signals
from sememe.models.planner.signals import (
    SignalProbe,
    SignalReader,
    auroc,
    document_counts,
    hashed,
    key_terms,
    kind_of,
)


@pytest.mark.parametrize(
    ("words", "bucket"), [(0, 0), (7, 0), (8, 1), (15, 1), (16, 2), (255, 5), (256, 6), (9999, 6)]
)
def test_length_bucket(words, bucket):
    assert signals.length_bucket("word " * words) == bucket


@pytest.mark.parametrize(
    ("text", "has"), [("in 1969", True), ("x2", True), ("one and two", False), ("", False)]
)
def test_has_number(text, has):
    assert signals.has_number(text) is has


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("We met Anna there.", True),
        ("It is near Lake Como.", True),
        ("Yes, Bob did.", True),
        ("the town of Örebro", True),
        ("The cat sat. It slept.", False),
        ("I think I'm right and I know.", False),
        ("", False),
        ("Lines\nBegin\nSo", False),
        ('He said: "Come in."', False),
        ("what ABC means", False),
    ],
)
def test_has_entity(text, has):
    assert signals.has_entity(text) is has


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The sea was calm. Nobody spoke.", "prose"),
        ("", "prose"),
        (
            "Long ago there was a tower\nfor those who came by land,\nand a harbour for the "
            "others.",
            "prose",
        ),
        ("They asked me to forgive these formalities;\nwe had to be strict.", "prose"),
        ("from the other side\nfrom far away\nfor us", "prose"),
        ("- milk\n- eggs\n- bread", "list"),
        ("You need:\n\n1. a pan\n2. some oil\n3. patience", "list"),
        ("a) red\nb) blue", "list"),
        ("def f(x):\n    return g(x)\n", "code"),
        ("Use this:\n```\nls -l\n```\nThen look.", "code"),
        ("int main() {\n  int x = 3;\n  return x;\n}", "code"),
        ("import os\nfrom pathlib import Path\n\nroot = Path(os.sep)", "code"),
        ("<ul>\n<li>one</li>\n</ul>", "code"),
        ("What is the capital of that country?", "question"),
        ('It rained. Why did nobody come?"', "question"),
        ("Anna: Where were you?\nBo: At home.\nAnna: I see.", "dialogue"),
        ('"Come in," she said.\n"No," said he.', "dialogue"),
        ("“I never said that I would go there with you,” he said.", "dialogue"),
        ("— Who is it?\n— Me.", "dialogue"),
        ('She called it "odd" and went on with her long walk by the river.', "prose"),
    ],
)
def test_kind_of(text, kind):
    assert kind_of(text) == kind


def test_key_terms_are_frequent_here_and_rare_elsewhere():
    texts = [
        "the whale and the whale and a ship",
        *["the sun and the moon"] * 4,
        "the ship and the port",
    ]
    counts = document_counts(texts)
    assert counts["the"] == 6 and counts["whale"] == 1 and "a" not in counts
    assert key_terms(texts[0], counts, len(texts)) == [
        "whale"
    ]  # a third of the six documents have "ship"
    assert key_terms(texts[0], Counter(whale=1, ship=2, the=60), 60) == ["and", "whale", "ship"]
    assert key_terms("zeta alpha", counts, 6, top=1) == ["alpha"]
    assert key_terms("", counts, 6) == []


def test_hashed_is_the_same_everywhere_and_without_order():
    bag = hashed(["whale", "ship"], 64)
    assert torch.equal(bag, hashed(["ship", "whale", "ship"], 64))
    assert bag.nonzero().flatten().tolist() == [5, 36]
    assert hashed([], 8).sum() == 0


def test_the_reader_gives_one_label_for_each_text_and_counts_training_texts_only():
    reader = SignalReader.fit(["the whale", "the ship", "the sea", "the sun", "the moon"])
    labels = reader(["the whale met Anna in 1851", "- one\n- two"])
    assert labels["length"].tolist() == [0, 0] and labels["kind"].tolist() == [
        0,
        signals.KINDS.index("list"),
    ]
    assert labels["entity"].tolist() == [[1], [0]] == labels["number"].tolist()
    assert torch.equal(labels["terms"][0], hashed(["whale", "met", "anna"]))
    assert {name: 1 if label.dim() == 1 else label.shape[1] for name, label in labels.items()} == {
        name: size if name not in ("length", "kind") else 1 for name, size in signals.SIZES.items()
    }
    with pytest.raises(DataError, match="no text"):
        reader([])


def test_auroc():
    wanted = torch.tensor([[0], [0], [1], [1]])
    assert auroc(torch.tensor([[0.1], [0.4], [0.35], [0.8]]), wanted) == 0.75
    assert auroc(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), wanted) == 1
    assert auroc(torch.zeros(4, 1), wanted) == 0.5
    assert auroc(torch.tensor([[0.0], [1.0], [1.0], [2.0]]), wanted) == 0.875
    two = torch.cat([wanted, torch.ones(4, 1)], 1)  # a column with one answer alone is left out
    assert auroc(torch.arange(4.0)[:, None].expand(4, 2), two) == 1
    assert math.isnan(auroc(torch.zeros(4, 1), torch.ones(4, 1)))


def labelled(count: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features of which the first three tell `kind`, the next one `number`; nothing tells
    `entity`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return x * 50 + 7, {
        "kind": x[:, :3].argmax(1),
        "number": (x[:, 3:4] > 0.3).float(),
        "entity": (torch.rand(count, 1, generator=generator) < 0.3).float(),
    }


def test_probes_find_what_the_features_tell_and_no_more():
    x, labels = labelled(400, 0)
    unseen, wanted = labelled(400, 1)
    probe = SignalProbe(8, {"kind": 3, "number": 1, "entity": 1}).fit(x, labels)
    scores = probe.score(unseen, wanted, labels)
    assert scores["kind"]["accuracy"] > 0.9 > 0.45 > scores["kind"]["base_accuracy"]
    assert scores["kind"]["auroc"] > 0.97 and scores["number"]["auroc"] > 0.97
    assert scores["number"]["loss"] < 0.5 * scores["number"]["base_loss"]
    assert 0.4 < scores["entity"]["auroc"] < 0.6
    assert scores["entity"]["loss"] > 0.97 * scores["entity"]["base_loss"]
    again = (
        SignalProbe(8, {"kind": 3, "number": 1, "entity": 1})
        .fit(x, labels)
        .score(unseen, wanted, labels)
    )
    assert again == scores


def test_a_probe_that_is_not_fitted_gives_even_odds_and_passes_gradients_on():
    x, labels = labelled(6, 0)
    probe = SignalProbe(8, {"kind": 3, "number": 1})
    losses = probe(x.requires_grad_(), labels)
    assert losses["kind"].item() == pytest.approx(math.log(3)) and losses[
        "number"
    ].item() == pytest.approx(math.log(2))
    torch.nn.init.normal_(probe.heads["kind"].weight)
    probe(x, labels)["kind"].backward()
    assert x.grad.abs().sum() > 0


def test_texts_to_scores():
    """A bag of ids that stands for the text's kind tells the kind, and nothing of numbers."""
    texts = [
        "- one\n- two",
        "- a\n- b 1",
        "Who is it?",
        "Who was 1 of them?",
        "It was so.",
        "It was 7 then.",
    ] * 20
    labels = SignalReader.fit(texts)(texts)
    bag = torch.nn.functional.one_hot(labels["kind"], 5).float()
    scores = SignalProbe(5).fit(bag, labels).score(bag, labels, labels)
    assert set(scores) == {"length", "kind", "entity", "number", "terms"}
    assert scores["kind"]["accuracy"] == 1 and scores["number"]["auroc"] == 0.5
    assert math.isnan(scores["entity"]["auroc"])
