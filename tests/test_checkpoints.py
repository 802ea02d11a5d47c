"""What a run keeps on the disk: never fewer than one whole checkpoint, nothing damaged that goes
unnoticed or lost, no pickles, full disks."""

import contextlib
import os
import pickle
import random
import re
import resource
import shutil
import stat
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import safetensors.torch
import torch

from conftest import ctrl_c, run, sememe
from sememe import cli, storage
from sememe.errors import BaseError, CheckpointError, Interrupted, SememeError
from sememe.models.loading import load_model
from sememe.options import check_recipe
from sememe.training import checkpoints
from sememe.training.checkpoints import (
    last_checkpoint,
    remove_unsealed,
    resume_point,
    rotate,
    seal,
    step_of,
)
from sememe.training.state import MOMENTS, load_random, save_random
from sememe.workers import Worker, part_file, read_part


class Killed(BaseException):
    """No `except Exception` of ours sees it, as none sees a kill."""


@contextlib.contextmanager
def killed_at(number: int, folder: Path, monkeypatch):
    """Ends the block before its `number`-th change of a file, none of which leaves `folder`
    without a whole checkpoint."""
    changes = []

    def before(real):
        def change(*args, **kwargs):
            changes.append(1)
            if folder.exists():
                assert last_checkpoint(folder) is not None
            if len(changes) == number:
                raise Killed
            return real(*args, **kwargs)

        return change

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "replace", before(os.replace))
        patch.setattr(os, "fsync", before(lambda file: None))
        for name in ("unlink", "rmdir", "rename", "write_bytes"):
            patch.setattr(Path, name, before(getattr(Path, name)))
        yield changes


def save(folder: Path, step: int) -> None:
    """As a run saves."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (checkpoint / name).write_bytes(f"{name} {step}".encode())
    seal(checkpoint)
    rotate(folder)


def go_on(folder: Path) -> None:
    """As a run starts and saves."""
    step = step_of(resume_point(folder, print))
    remove_unsealed(folder)
    save(folder, step + 1)


def test_two_kills_anywhere_leave_a_whole_checkpoint(tmp_path, monkeypatch):
    first = tmp_path / "first"
    for step in (1, 2):
        save(first, step)
    with killed_at(0, first, monkeypatch) as changes:
        go_on(shutil.copytree(first, tmp_path / "count"))
    assert len(changes) > 10
    for one in range(1, len(changes) + 1):
        for two in range(1, len(changes) + 8, 3):
            folder = shutil.copytree(first, tmp_path / f"{one}-{two}")
            for number in (one, two):
                with killed_at(number, folder, monkeypatch):
                    go_on(folder)
            go_on(folder)
            kept = sorted(path.name for path in folder.iterdir())
            assert len(kept) == 2 and not any("damaged" in name for name in kept)
            assert all((folder / name / checkpoints.SEAL).is_file() for name in kept)


@pytest.fixture
def stopped(recipe_values, tmp_path):
    """(recipe, run) with checkpoints of steps 4 and 5."""
    values = recipe_values | {"gumbel": 0.5}
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, tmp_path / "r")
    return values, tmp_path / "r"


def harm(path: Path, draw: random.Random) -> bytes:
    """Flips a bit or cuts the end off; returns what it was."""
    before = path.read_bytes()
    at = draw.randrange(len(before))
    after = bytearray(before)
    after[at] ^= 1 << draw.randrange(8)
    path.write_bytes(after if draw.random() < 0.5 else before[:at])
    return before


def test_a_damaged_checkpoint_is_named_and_kept_and_the_one_before_goes_on(stopped, tmp_path):
    values, folder = stopped
    top, draw = folder / "checkpoints" / "checkpoint-5", random.Random(0)
    files = sorted(path for path in top.iterdir() if path.name != checkpoints.SEAL)
    for number in range(100):
        path = files[number % len(files)]
        before = harm(path, draw)
        assert last_checkpoint(top.parent).name == "checkpoint-4", path.name
        path.write_bytes(before)
    for content in ("", "[]", "null", "3", "{}", '{"config.json": 1}', "[" * 10_000, '{"..": "x"}'):
        kept = (top / checkpoints.SEAL).read_bytes()
        (top / checkpoints.SEAL).write_text(content)
        assert last_checkpoint(top.parent).name == "checkpoint-4", content
        (top / checkpoints.SEAL).write_bytes(kept)
    assert last_checkpoint(top.parent) == top
    harm(top / MOMENTS, draw)
    said: list[str] = []
    lines = run(values, folder, said.append)
    assert any(f"{MOMENTS} is damaged" in x and "checkpoint-5.damaged-1" in x for x in said), said
    assert any("resuming from step 4" in line for line in said)
    assert (top.parent / "checkpoint-5.damaged-1" / MOMENTS).is_file()
    whole = run(values, tmp_path / "whole")
    loss = {line["step"]: line["loss"] for line in lines}
    assert [loss[line["step"]] for line in whole] == [line["loss"] for line in whole]


def test_no_run_starts_over_unasked(stopped):
    values, folder = stopped
    for path in (folder / "checkpoints").iterdir():
        harm(path / "model.safetensors", random.Random(1))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no whole checkpoint.*damaged-1.*try: "):
            run(values, folder)
    assert len([*(folder / "checkpoints").iterdir()]) == 2
    (folder / "checkpoints").rename(folder / "elsewhere")
    said: list[str] = []
    run(values, folder, said.append)
    assert not any("resuming" in line for line in said)


def test_a_start_that_was_killed_is_no_other_run(recipe_values, tmp_path, monkeypatch):
    real = os.replace
    for number in range(1, 6):
        calls = []

        def replace(*args, calls=calls, number=number):
            calls.append(1)
            if len(calls) == number:
                raise Killed
            real(*args)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", replace)
            run(recipe_values | {"steps": 2}, tmp_path / "r")
        (tmp_path / "r").mkdir(exist_ok=True)  # the first of all writes is to SEMEME_HOME
        (tmp_path / "r" / f".env.json.{number}.tmp").touch()
    assert len(run(recipe_values | {"steps": 2}, tmp_path / "r")) == 2
    assert not [*(tmp_path / "r").rglob("*.tmp")]


class Trap:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_pickle_is_written_or_read(stopped, tmp_path):
    """Under a seal that is right, as somebody would send it."""
    values, folder = stopped
    top = last_checkpoint(folder / "checkpoints")
    assert all(path.suffix in (".json", ".safetensors") for path in top.iterdir())
    trap = pickle.dumps(Trap(tmp_path / "ran"))
    for name in ("optimizer", "scheduler", "scaler", "training_args", "pytorch_model", "rng_state"):
        (top / f"{name}.bin").write_bytes(trap)
        (top / f"{name}.pt").write_bytes(trap)
        (top / f"{name}.pth").write_bytes(trap)
    seal(top)
    # A pickle for what the run needs, and a checkpoint of an earlier release, which lacks it.
    for name in ("random-0.json", "trainer_state.json", MOMENTS, ""):
        path = top / (name or MOMENTS)
        before = path.read_bytes()
        path.unlink()
        if name:
            path.write_bytes(trap)
        seal(top)
        with pytest.raises(CheckpointError, match=r"need .*try: "):
            run(values, folder)
        path.write_bytes(before)
    before = (top / storage.WEIGHTS).read_bytes()
    fewer = dict([*safetensors.torch.load(before).items()][1:])
    (top / storage.WEIGHTS).write_bytes(safetensors.torch.save(fewer))
    seal(top)
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        run(values, folder)
    (top / storage.WEIGHTS).write_bytes(before)
    seal(top)
    assert len(run(values, folder)) == 8 and not (tmp_path / "ran").exists()


def test_random_numbers_go_on_as_they_would_have(tmp_path):
    def draws() -> list[float]:
        return [random.gauss(), np.random.normal(), float(torch.randn(()))]

    draws()  # half of a pair of normal numbers waits in Python and in numpy
    save_random(tmp_path, 3)
    wanted = [draws(), draws()]
    load_random(tmp_path, 0)  # another process: nothing of it is there
    load_random(tmp_path, 3)
    assert [draws(), draws()] == wanted


@pytest.fixture
def limited():
    """Files may then be no larger than so many bytes: writers get EFBIG, as they get ENOSPC on a
    full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limit(size: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def test_a_full_disk_is_one_sentence_and_whole_checkpoints_stand(stopped, tmp_path, limited):
    values, folder = stopped
    whole = run(values, tmp_path / "whole")
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for size in (3_000, 20_000, largest // 2):  # a log, random numbers, weights
        with limited(size), pytest.raises(SememeError, match=r"could not write .*too large.*try: "):
            run(values, folder)
        assert last_checkpoint(folder / "checkpoints").name == "checkpoint-5"
    lines = {line["step"]: line["loss"] for line in run(values, folder)}
    assert [lines[line["step"]] for line in whole] == [line["loss"] for line in whole]
    left = [path.name for path in folder.rglob("*") if "tmp" in path.name]
    assert not left


def test_a_full_disk_is_told_by_every_command(
    recipe_values, texts, tmp_path, limited, monkeypatch, capsys
):
    """And by the name of what could not be written, whoever writes it."""
    online, plain = tmp_path / "r", tmp_path / "compressor"
    run(recipe_values | {"steps": 2}, online)
    values = recipe_values | {"steps": 2, "system": "compressor", "max_tail": 3}
    del values["split"]
    run(values, plain)
    recipe, short = tmp_path / "r.yaml", tmp_path / "short.txt"
    recipe.write_text(check_recipe(recipe_values, "test").yaml())
    short.write_text("the cat sat on a mat " * 20)
    sememe("compress", plain, short, "--out", tmp_path / "codes.json")
    commands = {
        f"train {recipe} --out {tmp_path / 'new'}": "new",
        f"sweep {recipe} rate=0.5 --out {tmp_path / 'sweep'}": "sweep",
        f"evaluate {online} --data {texts[1]} --tokens 64 --json {tmp_path / 'e.json'}": "e.json",
        f"generate {online} --prompt the --cache {tmp_path / 'talk'}": "talk",
        f"compress {plain} {short} --out {tmp_path / 'c.json'}": "c.json",
        f"decompress {plain} {tmp_path / 'codes.json'} --out {tmp_path / 'back.txt'}": "back.txt",
        f"report {online}": "report.html",
        f"doctor {online} --json {tmp_path / 'd.json'}": "d.json",
        f"export {online} --out {tmp_path / 'merged'}": "merged",
    }
    for command, name in commands.items():
        monkeypatch.setattr("sys.argv", ["sememe", *command.split()])
        with limited(10), pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1, command
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"could not write \S*/{name}\S* \(.*large.*try: ", said), said
        assert not [*tmp_path.rglob("*.tmp")]


def test_files_have_the_mode_of_the_umask(recipe_values, tmp_path):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            run(recipe_values | {"steps": 2}, tmp_path / oct(mask))
        finally:
            os.umask(before)
        for path in (tmp_path / oct(mask)).rglob("*"):
            wanted = (0o777 if path.is_dir() else 0o666) & ~mask
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_no_file_of_a_run_changes_unnoticed(recipe_values, tmp_path):
    folder, draw = tmp_path / "r", random.Random(2)
    run(recipe_values | {"steps": 2}, folder)
    files = [*(folder / "model").iterdir(), *(folder / x for x in ("recipe.yaml", "inputs.json"))]
    names = {path.name for path in files}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    for path in files:
        for _ in range(4):
            before = harm(path, draw)
            with contextlib.suppress(CheckpointError, BaseError):
                if path.parent == folder:
                    run(recipe_values | {"steps": 2}, folder)
                else:
                    load_model(folder)
                # A manifest that has the same hashes is harmless.
                assert path.name == storage.MANIFEST, path
            path.write_bytes(before)
    load_model(folder)


def test_a_damaged_part_of_shared_work_is_done_again(tmp_path):
    worker = Worker(lambda: lambda part: {"y": part["x"] + 1}, (), tmp_path)
    content = safetensors.torch.save({"x": torch.ones(2)})
    block, path = pyarrow.table({"number": [0], "part": [content]}), part_file(tmp_path, 0)
    for number in range(20):
        worker(block)
        assert read_part(path)["y"].tolist() == [2, 2]
        harm(path, random.Random(number))
        assert read_part(path) is None
