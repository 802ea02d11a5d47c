"""Files and folders as users have them: links, pipes, what may not be written to, what was moved,
and what is not ours."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from conftest import ctrl_c, metrics, run, sememe
from sememe import cli, measure
from sememe.errors import Interrupted, RecipeError, SememeError
from sememe.evaluation import inputs, results
from sememe.options import check_recipe
from sememe.training.checkpoints import last_checkpoint
from sememe.training.run import train

posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")


@posix
def test_pipes_and_links_are_written_into(tmp_path):
    pipe, link, target, read = (
        tmp_path / "pipe",
        tmp_path / "link.json",
        tmp_path / "target.json",
        [],
    )
    os.mkfifo(pipe)
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    for path in (pipe, link):
        sememe("pull", "--json", path)
    reader.join(20)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()
    assert read == [target.read_text()] and json.loads(read[0])
    assert stat.S_IMODE(target.stat().st_mode) == 0o600, "what was private stays private"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe", "target.json"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(
        os,
        "fsync",
        lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    )
    with pytest.raises(SememeError, match="No space left"):
        results.put(tmp_path / "x.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and (
        tmp_path / "x.json"
    ).read_text() == "old"


def test_a_file_that_cannot_be_renamed_onto_is_written_in_place(tmp_path, monkeypatch):
    """A single file that is mounted into a container, or one in a folder that is read-only."""
    (tmp_path / "x.json").write_text("old, and longer than the new")
    monkeypatch.setattr(
        os, "replace", lambda *names: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy"))
    )
    results.put(tmp_path / "x.json", ["\ud83d"])
    assert json.loads((tmp_path / "x.json").read_text()) == ["\ud83d"], (
        "half a character is JSON too"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    monkeypatch.undo()
    results.put(tmp_path / ("n" * 250), {})


@pytest.mark.parametrize("place", [".", "no/such/e.json", "n" * 300])
def test_a_bad_place_for_json_is_refused_ahead_of_the_work(tmp_path, monkeypatch, place):
    monkeypatch.setattr(measure, "evaluate", lambda *args: pytest.fail("hours of work"))
    said = sememe("evaluate", "anything", "--data", "a.txt", "--json", tmp_path / place, code=1)
    assert "could not write" in said and "try: " in said
    assert not list(tmp_path.iterdir())


def test_json_on_stdout_stands_alone(tmp_path):
    result = CliRunner().invoke(cli.app, ["pull", "--json", "-"])
    assert json.loads(result.stdout)[0]["name"] == "smollm2-135m" and "known bases" in result.stderr
    if os.path.exists("/dev/fd/1"):  # what /dev/stdout leads to
        with (tmp_path / "out").open("w") as out:
            subprocess.run(
                [sys.executable, "-m", "sememe", "pull", "--json", "/dev/fd/1"],
                stdout=out,
                stderr=subprocess.PIPE,
                check=True,
            )
        assert json.loads((tmp_path / "out").read_text()) and not Path("-").exists()


def test_a_run_that_may_only_be_read_is_evaluated(recipe_values, tmp_path, monkeypatch):
    run(recipe_values, tmp_path / "r")
    real = os.replace

    def replace(source, target):
        if tmp_path / "r" in Path(target).parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert "nll" in sememe(
        "evaluate", tmp_path / "r", "--tokens", 64, "--json", tmp_path / "e.json"
    )
    assert json.loads((tmp_path / "e.json").read_text())["nll"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-best",
        "checkpoint-4.tar.gz",
        "checkpoint-1-mine",
        "checkpoint-99-mine",
        "checkpoint-7",
    ],
)
def test_what_else_lies_beside_checkpoints_stays(recipe_values, tmp_path, name):
    with ctrl_c(5), pytest.raises(Interrupted):
        run(recipe_values, tmp_path / "r")
    mine = tmp_path / "r" / "checkpoints" / name
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert len(run({**recipe_values, "save_every": 1}, tmp_path / "r2")) == 8  # rotates
    run(recipe_values, tmp_path / "r")
    assert (mine / "notes.txt").read_text() == "mine"
    for folder, steps in ((tmp_path / "r", {"5", "8"}), (tmp_path / "r2", {"7", "8"})):
        names = {p.name for p in (folder / "checkpoints").iterdir()} - {name} | (
            {name} if folder.name == "r2" else set()
        )
        assert {f"checkpoint-{step}" for step in steps} <= names | {name}


def test_cut_off_checkpoints_of_our_own_are_removed(recipe_values, tmp_path):
    run(recipe_values, tmp_path / "r")
    folder = tmp_path / "r" / "checkpoints"
    (folder / "checkpoint-8" / "seal.json").unlink()
    assert last_checkpoint(folder).name == "checkpoint-4"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]


def test_a_thread_trains(recipe_values, tmp_path):
    said = []

    def work():
        try:
            train(check_recipe(recipe_values, "test"), tmp_path / "r", say=said.append, show=False)
        except BaseException as error:
            said.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert (tmp_path / "r" / "model" / "manifest.json").is_file(), said


@pytest.fixture
def project(base_folder, texts, recipe_values, tmp_path):
    """A folder with base and texts, its recipe's values (relative paths), and a run that was
    stopped at step 5 of 8."""
    folder = tmp_path / "old"
    shutil.copytree(base_folder, folder / "base")
    for name, path in zip(("train.txt", "heldout.txt"), texts, strict=True):
        shutil.copy(path, folder / name)
    values = recipe_values | {
        "base": "base",
        "data": {"train": "train.txt", "heldout": "heldout.txt"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with ctrl_c(5), pytest.raises(Interrupted):
            run(values, Path("run"))
    return folder, values


def test_a_moved_run_goes_on(project, tmp_path, monkeypatch):
    folder, values = project
    folder.rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    values = values | {
        "base": str(tmp_path / "new" / "base"),
        "data": {"train": "new/train.txt", "heldout": "new/heldout.txt"},
    }
    said = []
    assert [line["step"] for line in run(values, tmp_path / "new" / "run", said.append)] == list(
        range(1, 9)
    )
    assert any("data.train is new/train.txt now, and was train.txt" in line for line in said)
    assert "nothing to train" in "".join(_said(values, tmp_path / "new" / "run"))


def _said(values, folder) -> list[str]:
    said = []
    run(values, folder, said.append)
    return said


def test_other_content_under_the_same_name_is_refused(project, monkeypatch):
    folder, values = project
    monkeypatch.chdir(folder)
    with (folder / "train.txt").open("a") as file:
        file.write("more")
    with pytest.raises(
        RecipeError, match=r"data.train = train.txt, which was changed since.*try: "
    ):
        run(values, Path("run"))
    os.rename("train.txt", "other.txt")
    with pytest.raises(RecipeError, match=r"data.train = train.txt, not other.txt"):
        run(values | {"data": {"train": "other.txt", "heldout": "heldout.txt"}}, Path("run"))


def test_texts_are_found_from_another_folder(project, tmp_path, monkeypatch):
    folder, _ = project
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "heldout.txt").write_text("of another project")
    assert inputs.run_recipe(folder / "run")["data"]["heldout"] == str(folder / "heldout.txt")
    folder.rename(tmp_path / "new")
    assert inputs.run_recipe(tmp_path / "new" / "run")["data"]["train"] == str(
        tmp_path / "new" / "train.txt"
    )
    monkeypatch.chdir(tmp_path / "new")
    assert inputs.run_recipe("run")["data"]["heldout"] == "heldout.txt", (
        "as it was typed, where that holds"
    )


def test_a_finished_run_is_made_longer(recipe_values, tmp_path):
    run(recipe_values, tmp_path / "r")
    sememe("evaluate", tmp_path / "r", "--tokens", 64)
    with pytest.raises(
        RecipeError, match=r"ahead of the end of quantise.*need at most 14 steps.*try: "
    ):
        run({**recipe_values, "steps": 16}, tmp_path / "r")
    said = _said({**recipe_values, "steps": 12}, tmp_path / "r")
    assert any("the learning rate goes from 10% of its peak to 36%" in line for line in said), said
    lines = metrics(tmp_path / "r")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["quantise"] == 1 for line in lines[8:])
    assert (tmp_path / "r" / "model-8" / "evaluate.json").is_file() and not (
        tmp_path / "r" / "evaluate.json"
    ).exists()
    assert json.loads((tmp_path / "r" / "inputs.json").read_text())["lengthened"] == [
        {"step": 8, "steps": 8}
    ]
    assert yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text())["steps"] == 12
    with pytest.raises(RecipeError, match="with steps = 12, not 8"):
        run(recipe_values, tmp_path / "r")


def test_a_temperature_near_zero_is_greedy(recipe_values, tmp_path):
    run(recipe_values, tmp_path / "r")
    texts = [
        sememe(
            "generate",
            tmp_path / "r",
            "--prompt",
            "the cat",
            "--max-new-tokens",
            4,
            "--temperature",
            t,
        )
        for t in ("0", "1e-40")
    ]
    assert texts[0] == texts[1]


def test_version():
    assert sememe("--version").startswith("sememe 0.")


@pytest.mark.parametrize(
    "words",
    [("evaluate", "n" * 300, "--data", "a.txt"), ("export", "~nobody-at-all/x", "--out", "out")],
)
def test_what_the_system_refuses_is_one_line(tmp_path, words):
    done = subprocess.run(
        [sys.executable, "-m", "sememe", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "try: " in done.stderr
    assert len(done.stderr.splitlines()) == 1
