"""A pass key in a long text, and the loss by position: a concept model beside its base with all of
its cache, and with a sliding window and sink of the concept model's cache.

    python examples/needle.py smollm2-135m-online NOVEL.txt --lengths 1024,2048 --texts 4

One line of JSON for each text, length, depth and reader: `nll` of the key's digits in nats,
`exact`: greedy decoding would say them all, `by_position`: mean loss from each power of two on."""

import argparse
import json
import random
from pathlib import Path

import torch

from sememe.models import ControlConfig, ControlForCausalLM
from sememe.models.loading import load_model

KEY = " The pass key is {key}. Remember it: {key} is the pass key. "
QUESTION = " What is the pass key? The pass key is "
DEPTHS = (0.1, 0.5, 0.9)


def haystack(words: list[int], tokenizer, length: int, depth: float, seed: int):
    """(1, length) ids, how many of the last are digits of the key, and where the needle is."""
    draw = random.Random(seed)
    key = str(draw.randrange(10_000, 100_000))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    needle, question, digits = (encode(x) for x in (KEY.format(key=key), QUESTION, key))
    room = length - 1 - len(needle) - len(question) - len(digits)
    start = draw.randrange(len(words) - room)
    first, hay = int(depth * room), words[start : start + room]
    bos = tokenizer.bos_token_id
    ids = [bos, *hay[:first], *needle, *hay[first:], *question, *digits]
    return torch.tensor([ids]), len(digits), slice(first, first + len(needle))


def readers(model, plain, length: int):
    """(name, model) of each reader, the window as wide as the concept model has cache there."""
    rows = round(model.config.cache_share(length) * length)
    yield f"concepts, {rows} rows", model
    for name, window in (("base", None), (f"window of {rows}", max(1, rows - 1))):
        plain.config.window = window
        yield name, plain


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--texts", type=int, default=2)
    asked = parser.parse_args()
    model, tokenizer = load_model(asked.model, merge=False)
    config = ControlConfig(base=model.config.base, lora_rank=0)
    plain = ControlForCausalLM.from_base(config).eval()
    model.merged()
    text = Path(asked.text).read_text(encoding="utf-8")
    words = tokenizer.encode(text, add_special_tokens=False)
    lengths = [int(x) for x in asked.lengths.split(",")]
    for number in range(asked.texts):
        for length in lengths:
            for depth in DEPTHS:
                ids, digits, needle = haystack(words, tokenizer, length, depth, number)
                for reader, own in readers(model, plain, length):
                    line = {"text": number, "length": length, "depth": depth, "reader": reader}
                    print(json.dumps(line | figures(own, ids, digits, needle)), flush=True)


def figures(model, ids_1T: torch.Tensor, digits: int, needle: slice) -> dict:
    out = model(input_ids=ids_1T, use_cache=False)
    log_p_TV = out.logits[0, :-1].float().log_softmax(-1)
    nll_T = -log_p_TV.gather(1, ids_1T[0, 1:, None]).squeeze(1)
    right = log_p_TV[-digits:].argmax(-1) == ids_1T[0, -digits:]
    hay_T = nll_T.clone()
    hay_T[needle] = torch.nan
    ends = [2**n for n in range(6, 20) if 2**n < len(hay_T)]
    parts = zip([0, *ends], [*ends, len(hay_T) - digits - 12], strict=True)
    means = {start: round(float(hay_T[start:end].nanmean()), 4) for start, end in parts}
    nll = round(float(nll_T[-digits:].mean()), 4)
    return {"nll": nll, "exact": bool(right.all()), "by_position": means}


if __name__ == "__main__":
    main()
