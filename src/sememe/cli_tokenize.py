"""The command `sememe tokenize`."""

from collections.abc import Iterator
from typing import Any

from sememe import arguments, storage
from sememe.locks import only_user
from sememe.terminal import say


def tokenize(
    sources: arguments.Sources,
    base: arguments.TokenizerOf,
    out: arguments.OutShards,
    workers: arguments.LocalWorkers = 1,
    documents: arguments.Documents = False,
) -> Iterator[dict[str, Any]]:
    """Tokenise texts once, for training on more than memory holds: a folder of token shards, which
    a recipe takes wherever it takes a text. Texts are read in parts; the same command goes on
    where it was killed.

    Example: `sememe tokenize data/*.parquet --base smollm2-135m --out corpus --workers 8`

    Then: `sememe train recipes/smollm2-135m-online-r2.yaml data.train=corpus --out runs/corpus`"""
    with only_user(out), storage.writing(out, "free some space, and the same command"):
        from sememe.backbone.bases import load_tokenizer, resolve
        from sememe.shards import tokenize as write_shards

        tokenizer = load_tokenizer(resolve(base))
        manifest = write_shards(sources, tokenizer, out, workers, documents, say)
    totals = {key: sum(x[key] for x in manifest["shards"]) for key in ("tokens", "bytes")}
    shards = len(manifest["shards"])
    yield {"folder": str(out), "shards": shards} | totals
    say(f"{out}: {totals['tokens']:,} tokens of {totals['bytes']:,} bytes, in {shards} shards")
