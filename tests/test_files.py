"""Files as users have them: links, pipes, read-only, moved, and what is not ours."""

import errno
import json
import os
import shutil
import stat
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from conftest import ctrl_c, run, sememe
from sememe import cli, storage
from sememe.errors import Interrupted, RecipeError, SememeError
from sememe.evaluation.inputs import run_recipe
from sememe.generate import Request
from sememe.paths import existing, shown, usable
from sememe.training.checkpoints import last_checkpoint


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").write_text("")
    assert existing("~/here") == usable("~/here") == tmp_path / "here"
    for name in ("not", "not/there", "here/below"):
        assert existing(tmp_path / name) is None and usable(f"~/{name}") == tmp_path / name
    assert shown("a" * 80) == "a" * 80 and shown("a" * 81) == "a" * 80 + "… (81 characters)"
    for name in ("once upon a time " * 30, "x" * 300, "nul\0", "~nobody-of-that-name/x"):
        assert existing(name) is None
        with pytest.raises(SememeError, match=r"cannot be used as a path .*need .*try: "):
            usable(name)
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "stat", Mock(side_effect=denied))
    with pytest.raises(SememeError, match="Permission denied"):  # which is not missing
        existing(tmp_path / "closed" / "x")


def test_pipes_and_links_are_written_into(tmp_path):
    pipe, link, target = (tmp_path / name for name in ("pipe", "link", "target"))
    os.mkfifo(pipe)
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    for path in (pipe, link):
        sememe("pull", "--json", path)
    reader.join(20)
    assert read == [target.read_text()] and json.loads(read[0])
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600, "what was private stays private"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / "x.json").write_text("old, and longer than the new")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", Mock(side_effect=full))
        storage.write(tmp_path / "x.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old, and longer than the new"
    storage.write(tmp_path / ("n" * 250), b"")


def test_json_on_stdout_stands_alone_and_a_bad_place_is_refused_before_the_work(tmp_path):
    result = CliRunner().invoke(cli.app, ["pull", "--json", "-"])
    assert json.loads(result.stdout)[0]["name"] == "smollm2-135m" and "known bases" in result.stderr
    assert not Path("-").exists()
    for place in (".", "no/such/e.json", "n" * 300):
        words = ("--data", "a.txt", "--json", tmp_path / place)
        assert "could not write" in sememe("evaluate", "anything", *words, code=1)
    assert not list(tmp_path.iterdir())


def test_a_run_that_may_only_be_read_is_evaluated(recipe_values, tmp_path, monkeypatch):
    run(recipe_values, tmp_path / "r")
    replace = os.replace

    def denied(source, target):
        if tmp_path / "r" in Path(target).parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", denied)
    words = ("--tokens", 64, "--json", tmp_path / "e.json")
    assert "nll" in sememe("evaluate", tmp_path / "r", *words)
    assert json.loads((tmp_path / "e.json").read_text())["nll"] > 0


def test_what_else_lies_beside_checkpoints_stays(recipe_values, tmp_path):
    values = {**recipe_values, "save_every": 1}
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, tmp_path / "r")
    folder = tmp_path / "r" / "checkpoints"
    mine = [folder / f"checkpoint-{name}" for name in ("best", "4.tar.gz", "1-mine", "99-mine")]
    for path in mine:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    assert len(run(values, tmp_path / "r")) == 8
    assert all((path / "notes.txt").exists() for path in mine)
    # Of its own ones, the last two stay.
    assert {*folder.iterdir()} - {*mine} == {folder / "checkpoint-7", folder / "checkpoint-8"}
    (folder / "checkpoint-8" / "seal.json").unlink()
    assert last_checkpoint(folder).name == "checkpoint-7"


def test_a_thread_trains(recipe_values, tmp_path):
    worker = threading.Thread(target=run, args=(recipe_values, tmp_path / "r"))
    worker.start()
    worker.join()
    assert (tmp_path / "r" / "model" / "manifest.json").is_file()


@pytest.fixture
def project(base_folder, texts, recipe_values, tmp_path, monkeypatch):
    """A folder with base and texts, a recipe of relative paths, and its run, stopped at step 5."""
    folder = tmp_path / "old"
    shutil.copytree(base_folder, folder / "base")
    data = {path.stem: Path(shutil.copy(path, folder)).name for path in texts}
    values = recipe_values | {"base": "base", "data": data}
    monkeypatch.chdir(folder)
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, Path("run"))
    return folder, values


def test_a_moved_run_goes_on_and_finds_its_texts(project, tmp_path, monkeypatch):
    folder, values = project
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heldout.txt").write_text("of another project")
    assert run_recipe(folder / "run")["data"]["heldout"] == str(folder / "heldout.txt")
    folder.rename(tmp_path / "new")
    found = run_recipe(tmp_path / "new" / "run")["data"]["train"]
    assert found == str(tmp_path / "new" / "train.txt")
    values |= {"base": "new/base", "data": {"train": "new/train.txt", "heldout": "new/heldout.txt"}}
    said = []
    for _ in range(2):
        lines = run(values, tmp_path / "new" / "run", said.append)
        assert [line["step"] for line in lines] == list(range(1, 9))
    assert "nothing to train" in said[-1]


def test_other_content_under_the_same_name_is_refused(project):
    _, values = project
    with Path("train.txt").open("a") as file:
        file.write("more")
    with pytest.raises(RecipeError, match=r"data.train = train.txt, not what it holds now.*try: "):
        run(values, Path("run"))
    os.rename("train.txt", "other.txt")
    values["data"]["train"] = "other.txt"
    with pytest.raises(RecipeError, match=r"data.train = train.txt, not other.txt"):
        run(values, Path("run"))


def test_a_temperature_near_zero_is_greedy():
    assert Request("the cat", temperature=1e-40).sampling == Request("the cat").sampling == {}
