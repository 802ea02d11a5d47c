"""Signals: rules that read labels off texts, and linear probes that read them off features."""

import pytest
import torch

from sememe.models.planner.signals import KINDS, SignalProbe, SignalReader, hashed

LABELS = {
    "length": [("word " * n, k) for n, k in ((1, 0), (7, 0), (8, 1), (16, 2), (255, 5), (256, 6))],
    "number": [("in 1969", 1), ("x2", 1), ("one", 0), ("", 0)],
    "entity": [
        *((text, 1) for text in ("We met Anna.", "near Lake Como", "Yes, Bob did.", "of Örebro")),
        *((text, 0) for text in ("", "The cat sat. It slept.", "I think I'm right and I know.")),
        *((text, 0) for text in ("Lines\nBegin\nSo", 'He said: "Come in."', "what ABC means")),
    ],
    "kind": [
        *((text, "prose") for text in ("The sea was calm. Nobody spoke.", "")),
        ("Long ago there was a tower\nfor those who came by land,\nand a harbour.", "prose"),
        ("They asked me to forgive these formalities;\nwe had to be strict.", "prose"),
        ("from the other side\nfrom far away\nfor us", "prose"),
        ('She called it "odd" and went on with her long walk by the river.', "prose"),
        *((text, "list") for text in ("- milk\n- eggs\n- bread", "a) red\nb) blue")),
        ("You need:\n\n1. a pan\n2. some oil\n3. patience", "list"),
        *((text, "code") for text in ("def f(x):\n    return g(x)\n", "<ul>\n<li>one</li>\n</ul>")),
        ("Use this:\n```\nls -l\n```\nThen look.", "code"),
        ("int main() {\n  int x = 3;\n  return x;\n}", "code"),
        ("import os\nfrom pathlib import Path\n\nroot = Path(os.sep)", "code"),
        *((text, "question") for text in ("Is that so?", 'It rained. Why did nobody come?"')),
        ("Anna: Where were you?\nBo: At home.\nAnna: I see.", "dialogue"),
        *((text, "dialogue") for text in ('"Come in," she said.\n"No," said he.', "— Who?\n— Me.")),
        ("“I never said that I would go there with you,” he said.", "dialogue"),
    ],
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name):
    texts, labels = zip(*LABELS[name], strict=True)
    read = SignalReader([])(list(texts))[name].flatten().tolist()
    assert [KINDS[x] if name == "kind" else x for x in read] == list(labels)


def test_key_terms_are_frequent_here_and_rare_in_the_training_texts():
    text = "the whale and the whale and a ship"
    train = [text, *["the sun and the moon"] * 4, "the ship"]
    assert SignalReader(train).key_terms(text) == ["whale"], "a third of the documents have ship"
    other = SignalReader([*["the ship"] * 2, "the whale", *["the"] * 57])
    assert other.key_terms(text) == ["and", "whale", "ship"]
    assert other.key_terms("zeta alpha") == ["alpha", "zeta"] and other.key_terms("") == []
    bag = hashed(["whale", "ship"])
    assert bag.nonzero().flatten().tolist() == [5, 36], "the same on every machine"
    terms = SignalReader(["the whale", "the sea"])(["the whale met Anna in 1851", ""])["terms"]
    assert torch.equal(terms[0], hashed(["anna", "met", "whale"])) and not terms[1].any()


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
    (x, labels), (unseen, wanted) = labelled(400, 0), labelled(400, 1)
    probe = SignalProbe(8, {"kind": 3, "number": 1, "entity": 1}).fit(x, labels)
    scores = probe.score(unseen, wanted, labels)
    assert scores["kind"]["accuracy"] > 0.9 > 0.45 > scores["kind"]["base_accuracy"]
    assert scores["number"]["accuracy"] > 0.9 > 0.75 > scores["number"]["base_accuracy"]
    assert scores["number"]["loss"] < 0.6 * scores["number"]["base_loss"]
    assert scores["entity"]["loss"] > 0.97 * scores["entity"]["base_loss"]
