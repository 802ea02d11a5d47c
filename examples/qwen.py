"""A literal recipe (recipes/literal/) on a Qwen base: recipe → run folder → figures."""

import argparse
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from sememe.errors import SememeError
from sememe.evaluation.results import CONTRACT
from sememe.measure import Options, evaluate
from sememe.options import load_recipe
from sememe.training.run import train

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [f"data.{name}={ROOT / 'data' / name}.txt" for name in ("train", "heldout")]
TINY = ["steps=12", "batch_size=4", "sequence_length=64", "heldout_every=6", "heldout_tokens=512"]
"""A minute on one CPU core."""
FEW = ["num_concepts=64"], ["plan.sizes=[8,32]", "source_length=16", "target_length=48"]
"""Fewer codes, or plans of fewer ids, than 12 steps could tell apart."""


def tiny_base(folder: Path) -> Path:
    """A Qwen3 of 4 layers with random weights, and a tokenizer of 512 byte pairs learned from the
    text that comes with the repository."""
    if not (folder / "config.json").exists():
        pairs = ByteLevelBPETokenizer()
        pairs.train(str(ROOT / "data" / "train.txt"), 512, special_tokens=["<|endoftext|>"])
        end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, **end).save_pretrained(folder)
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
        config = Qwen3Config(**size, **heads, bos_token_id=None, eos_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def main(name: str) -> None:
    """The command line of the recipe `name`."""
    parser = argparse.ArgumentParser(description=f"recipes/literal/{name}.yaml on a Qwen base")
    add = parser.add_argument
    add("base", nargs="?", default="Qwen/Qwen3-0.6B", help="folder or Hub id of a Qwen2 or Qwen3")
    add("changes", nargs="*", default=[], metavar="key=value", help="other options of the recipe")
    add("--out", type=Path, default=Path("runs") / f"qwen-{name}", help="run folder")
    add("--tiny", action="store_true", help="a Qwen3 with random weights, and a minute of training")
    given = parser.parse_args()
    if given.tiny and "=" in given.base:  # there is no base to be named
        given.changes.insert(0, given.base)
    base = tiny_base(given.out.with_name(f"{given.out.name}-base")) if given.tiny else given.base
    is_planner = name.startswith("v3")
    tiny = [*TINY, *FEW[is_planner]] if given.tiny else []
    split = [] if is_planner else ["split=null"]  # as thick a middle as the base has room for
    changes = [f"base={base}", *TEXTS, *split, *tiny, *given.changes]
    try:
        recipe = load_recipe(ROOT / "recipes" / "literal" / f"{name}.yaml", changes)
        train(recipe, given.out)  # the same call resumes; a finished run is left as it is
        options = Options(tokens=recipe.heldout_tokens, search=1)
        figures = evaluate(str(given.out), recipe.data.heldout, options=options)
    except SememeError as error:
        sys.exit(f"error: {error}")
    for line in figures.get("given", []):
        print(f"nll with plan: {line['given']:12} {line['nll']:.4f}")
    for key in CONTRACT:
        if figures[key] is not None:
            print(f"{key:22} {figures[key]}")
