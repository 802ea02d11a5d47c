"""Fixtures: a tiny saved base with a byte tokenizer, and texts to train on. Nothing is downloaded."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import tiny_base

torch.set_num_threads(1)  # the models are tiny; threads that wait for each other cost more than they bring


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny Llama of 4 layers over bytes, saved as a base is."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    tiny_base(vocab_size=259, num_hidden_layers=4, initializer_range=0.1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """(train, heldout) files of patterned text that a tiny model can learn something from."""
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog"]
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train.txt", 4000), ("heldout.txt", 800)):
        picks = torch.randint(len(words), (count,), generator=generator).tolist()
        (folder / name).write_text(" ".join(words[i] for i in picks))
    return folder / "train.txt", folder / "heldout.txt"


@pytest.fixture
def recipe_values(base_folder, texts):
    """A recipe that trains in about a second."""
    return {
        "system": "online", "base": str(base_folder), "data": {"train": str(texts[0]), "heldout": str(texts[1])},
        "steps": 8, "sequence_length": 32, "batch_size": 2, "rate": 0.5, "max_tail": 6,
        "split": {"shallow": 1, "middle": 2, "deep": 1}, "num_concepts": 32, "precision": "fp32",
        "lora": {"rank": 4, "dropout": 0.1}, "log_every": 1, "heldout_every": 4, "heldout_tokens": 64, "save_every": 4,
        "calibration_tokens": 256, "schedule": {"rate": [0.0, 0.1]},
    }
