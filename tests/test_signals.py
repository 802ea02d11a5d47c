"""Signals: rules that read labels off texts, and linear probes that read them off features."""

import pytest
import torch

from sememe.models.planner.signals import (
    KINDS,
    SIZES,
    SignalProbe,
    SignalReader,
    hashed,
)

READER = SignalReader([])


LABELS = {
    "length": [("word " * n, k) for n, k in ((1, 0), (7, 0), (8, 1), (16, 2), (255, 5), (256, 6))],
    "number": [("in 1969", 1), ("x2", 1), ("one", 0), ("", 0)],
    "entity": [
        *((text, 1) for text in ("We met Anna.", "near Lake Como", "Yes, Bob did.", "of Örebro")),
        ("The cat sat. It slept.", 0),
        ("I think I'm right and I know.", 0),
        ("", 0),
        ("Lines\nBegin\nSo", 0),
        ('He said: "Come in."', 0),
        ("what ABC means", 0),
    ],
    "kind": [
        ("The sea was calm. Nobody spoke.", "prose"),
        ("", "prose"),
        ("Long ago there was a tower\nfor those who came by land,\nand a harbour.", "prose"),
        ("They asked me to forgive these formalities;\nwe had to be strict.", "prose"),
        ("from the other side\nfrom far away\nfor us", "prose"),
        ('She called it "odd" and went on with her long walk by the river.', "prose"),
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
    ],
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name):
    texts, labels = zip(*LABELS[name], strict=True)
    read = READER(list(texts))[name].flatten().tolist()
    assert [KINDS[x] if name == "kind" else x for x in read] == list(labels)


def test_key_terms_are_frequent_here_and_rare_elsewhere():
    texts = ["the whale and the whale and a ship", *["the sun and the moon"] * 4, "the ship"]
    reader = SignalReader(texts)
    assert reader.counts["the"] == 6 and reader.counts["whale"] == 1 and "a" not in reader.counts
    assert reader.key_terms(texts[0]) == ["whale"], "a third of the six documents have ship"
    other = SignalReader([*["the ship"] * 2, "the whale", *["the"] * 57])
    assert other.key_terms(texts[0]) == ["and", "whale", "ship"]
    assert reader.key_terms("zeta alpha") == ["alpha", "zeta"] and reader.key_terms("") == []


def test_the_reader_gives_one_label_for_each_text_and_counts_training_texts_only():
    bag = hashed(["whale", "ship"])
    assert torch.equal(bag, hashed(["ship", "whale", "ship"])), "without order"
    assert bag.nonzero().flatten().tolist() == [5, 36], "the same on every machine"
    reader = SignalReader(["the whale", "the ship", "the sea", "the sun", "the moon"])
    labels = reader(["the whale met Anna in 1851", "- one\n- two"])
    assert labels["length"].tolist() == [0, 0]
    assert labels["kind"].tolist() == [0, KINDS.index("list")]
    assert labels["entity"].tolist() == [[1], [0]] == labels["number"].tolist()
    assert torch.equal(labels["terms"][0], hashed(["whale", "met", "anna"]))
    assert {name: x.shape[1:].numel() for name, x in labels.items()} == SIZES | {
        "length": 1,
        "kind": 1,
    }


def labelled(count: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features of which the first three tell `kind`, the next one `number`; nothing tells
    `entity`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return x, {
        "kind": x[:, :3].argmax(1),
        "number": (x[:, 3:4] > 0.3).float(),
        "entity": (torch.rand(count, 1, generator=generator) < 0.3).float(),
    }


def test_probes_find_what_the_features_tell_and_no_more():
    x, labels = labelled(400, 0)
    unseen, wanted = labelled(400, 1)
    scores, again = (
        SignalProbe(8, {"kind": 3, "number": 1, "entity": 1})
        .fit(x, labels)
        .score(unseen, wanted, labels)
        for _ in range(2)
    )
    assert scores["kind"]["accuracy"] > 0.9 > 0.45 > scores["kind"]["base_accuracy"]
    assert scores["number"]["accuracy"] > 0.9 > 0.75 > scores["number"]["base_accuracy"]
    assert scores["number"]["loss"] < 0.6 * scores["number"]["base_loss"]
    assert scores["entity"]["loss"] > 0.97 * scores["entity"]["base_loss"]
    assert again == scores
