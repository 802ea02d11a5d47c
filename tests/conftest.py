"""A tiny saved base, texts and a recipe; how tests train, stop and call the command line."""

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from families import tiny_base
from sememe import cli
from sememe.errors import SememeError
from sememe.options import check_recipe
from sememe.paths import home
from sememe.training import callbacks
from sememe.training.run import train

# The models are tiny; threads that wait for each other cost more than they bring.
torch.set_num_threads(1)


def own_home() -> str:
    """A home for these tests, removed when they end: bases in temporary folders leave hashes there.
    The base that is pulled once stays in the user's."""
    folder = Path(tempfile.mkdtemp(prefix="sememe-home-"))
    with contextlib.suppress(OSError):
        pulled = home() / "bases"
        pulled.mkdir(parents=True, exist_ok=True)
        (folder / "bases").symlink_to(pulled.resolve())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


os.environ["SEMEME_HOME"] = own_home()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


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


def tiny_recipe(base_folder: Path, texts: tuple[Path, Path]) -> dict:
    """A recipe that trains in about a second."""
    data = {"train": str(texts[0]), "heldout": str(texts[1])}
    concepts = {"rate": 0.5, "max_tail": 6, "split": [1, 2, 1], "num_concepts": 32}
    training = {"steps": 8, "sequence_length": 32, "batch_size": 2, "precision": "fp32"}
    heldout = {"heldout_every": 4, "heldout_tokens": 64, "save_every": 4}
    values = {"system": "online", "base": str(base_folder), "data": data, "calibration_tokens": 256}
    return values | concepts | training | heldout | {"lora": {"rank": 4, "dropout": 0.1}}


@pytest.fixture
def recipe_values(base_folder, texts) -> dict:
    return tiny_recipe(base_folder, texts)


def run(values: dict, folder: Path, say: Callable[[str], None] = lambda line: None) -> list[dict]:
    """Trains a recipe into `folder`; returns what it logged."""
    train(check_recipe(values, "test"), folder, say=say, show=False)
    return metrics(folder)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def ctrl_c(step: int) -> Iterator[None]:
    """Training inside is asked to stop in its `step`-th step, counted over all runs."""
    real, seen = callbacks.Stop.on_step_end, []

    def stop(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        self.requested = len(seen) == step
        real(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.Stop, "on_step_end", stop)
        yield


def launch(values: dict, folder: Path, processes: int = 1, *options: str) -> subprocess.Popen:
    """`sememe train` in processes of its own."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(check_recipe(values, "test").yaml())
    several = f"-m torch.distributed.run --nproc-per-node {processes} --rdzv-backend c10d"
    several += " --rdzv-conf store_type=file"  # as the README has it
    words = f"{several if processes > 1 else ''} -m sememe train {recipe} --out {folder}"
    words += "".join(f" {option}" for option in options)
    output = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen([sys.executable, *words.split()], env=environment, **output)


def sememe(*words, code: int = 0) -> str:
    """Runs `main` in this process; returns what was printed."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if isinstance(result.exception, SememeError):
        assert code == result.exception.exit_code, result.exception
        return str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output
