"""Text of tokens: whole characters, every space, and pieces that are the text when put together."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer
from sememe.detokenize import INCOMPLETE, Detokenizer, decode, pieces
from sememe.evaluation.quality import sample

TEXT = "日本語 déjà 🙂 ok , the\tcat\n\n  sat ."


def spelled(*texts: str) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer of words that begin with a space, and of bytes where there is no word, decoded as
    Llama's are; and the ids of some texts."""
    words = ["<s>", "</s>", "▁", "▁the", "▁cat", "▁sat", ",", ".", "日"]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{n:02X}>" for n in range(256))])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    spaces = decoders.Replace("▁", " "), decoders.ByteFallback()
    raw.decoder = decoders.Sequence([*spaces, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokens = []
    for text in texts:
        tokens += [text] if text in vocab else [f"<0x{byte:02X}>" for byte in text.encode()]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    return tokenizer, [vocab[token] for token in tokens]


CASES = {
    "bytes": (byte_tokenizer(), byte_tokenizer()(TEXT).input_ids),
    "sentencepiece": spelled("▁the", "▁cat", "▁", "本", "日", "🙂", "▁sat", "▁", ".", "\t", "▁the"),
}


@pytest.mark.parametrize("kind", CASES)
def test_pieces_are_the_text_and_whole_characters(kind):
    tokenizer, ids = CASES[kind]
    whole, cut, stream = decode(tokenizer, ids), pieces(tokenizer, ids), Detokenizer(tokenizer)
    assert whole == (TEXT if kind == "bytes" else "the cat 本日🙂 sat .\t the")
    assert len(cut) == len(ids) and "".join(cut) == whole and INCOMPLETE not in whole
    assert [stream.add(token) for token in ids] == cut and stream.rest() == ""


@pytest.mark.parametrize("kind", CASES)
def test_half_a_character_is_held_back_and_not_lost(kind):
    cut = pieces(*spelled("▁the", "▁cat", "🙂", "▁sat"))
    assert cut == ["the", " cat", *[""] * 3, "🙂", " sat"]
    tokenizer, ids = CASES[kind]
    half = tokenizer.convert_tokens_to_ids("ð" if kind == "bytes" else "<0xF0>")
    stream = Detokenizer(tokenizer, skip_special_tokens=True)
    text = "".join(stream.add(token) for token in [1, *ids, half])
    assert text == decode(tokenizer, ids) and stream.rest() == INCOMPLETE
    assert "".join(pieces(tokenizer, [1, *ids])) == decode(tokenizer, [1, *ids])


def test_samples_are_cut_between_characters():
    """A block begins and ends inside a character; what is left of those is no text."""
    tokenizer, ids = CASES["bytes"]
    concepts = torch.tensor([-2, -1, 3, -1, 4, -1])
    rows = sample(torch.tensor(ids[1:7]), concepts, tokenizer)["pieces"]
    assert [piece["text"] for piece in rows] == ["", "", "", "", "本", ""]
    assert [piece["concept"] for piece in rows] == [None, None, 3, None, 4, None]
    assert [piece["sink"] for piece in rows] == [True] + [False] * 5
