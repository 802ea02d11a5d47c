"""Assignments on disk: before a batch or behind it, whatever happens; another's are refused."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sememe.concepts.plan import PlanShape
from sememe.errors import CheckpointError
from sememe.training.em.store import Assignments

SHAPE = PlanShape((1000, 1000), (2, 3))
ROWS = torch.arange(7)
FORK = multiprocessing.get_context("fork")


def opened(folder: Path, examples: int = 7, digest: str = "these") -> Assignments:
    return Assignments.open(folder, SHAPE, examples, digest)


def batch(value: int, rows: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plans, scores and moves that all say `value`."""
    plan = torch.full((rows, 5), value)
    return plan, plan[:, :4].float(), plan.float()


def said(store: Assignments, index: torch.Tensor = ROWS) -> list[float]:
    """All different numbers of these rows."""
    return (
        torch.cat([store.read(index).double(), store.scores(index), store.moves(index)], 1)
        .unique()
        .tolist()
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_what_is_written_is_read_again(tmp_path):
    store = opened(tmp_path / "a")
    assert (
        not store.assigned(ROWS).any()
        and (store.read(ROWS) == -1).all()
        and store.scores(ROWS).isnan().all()
    )
    plan = SHAPE.pack([[[], []], [[5], [1, 2, 3]]])
    store.write(
        torch.tensor([4, 1]), plan, torch.tensor([[-3.0, -2, -1, 0.5], [-4.0, -3, -1, torch.nan]])
    )
    for again in (store, opened(tmp_path / "a")):
        assert torch.equal(again.read(torch.tensor([1, 4])), plan.flip(0)), "the empty plan is one"
        assert again.assigned(ROWS).tolist() == [False, True, False, False, True, False, False]
        assert not again.searched(ROWS).any() and again.moves(ROWS).isnan().all()
        assert (
            again.scores(torch.tensor([4])).tolist() == [[-3, -2, -1, 0.5]]
            and again.scores(torch.tensor([1]))[0, 3].isnan()
        )
    assert (tmp_path / "a" / "journal.bin").stat().st_size == 0
    raw = np.fromfile(tmp_path / "a" / "plans.bin", "<i4").reshape(7, 5)
    assert raw[1].tolist() == [5, -1, 1, 2, 3] and (raw[0] == -2).all(), "as the formats say"


def test_steps_are_counted_and_say_who_was_searched(tmp_path):
    store = opened(tmp_path)
    store.write(ROWS, batch(1)[0])
    for version in range(3):
        assert store.version == version and not store.searched(ROWS).any()
        store.write(ROWS[:4], *batch(version, 4))
        store = opened(tmp_path)
        assert store.searched(ROWS).tolist() == [True] * 4 + [False] * 3
        store.finish_step()
    assert opened(tmp_path).version == 3 and said(store, ROWS[:4]) == [2]


@pytest.mark.parametrize(
    "change, name",
    [
        ({"shape": PlanShape((1000, 999), (2, 3))}, "sizes"),
        ({"shape": PlanShape((1000, 1000), (3, 2))}, "lengths"),
        ({"examples": 8}, "examples"),
        ({"digest": "f" * 64}, "digest = these: need ffffffffffff…"),
    ],
)
def test_assignments_of_something_else_are_refused(tmp_path, change, name):
    opened(tmp_path).write(ROWS, *batch(3))
    before = bytes_of(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        Assignments.open(tmp_path, **{"shape": SHAPE, "examples": 7, "digest": "these"} | change)
    assert bytes_of(tmp_path) == before


def test_damage_is_said(tmp_path):
    opened(tmp_path).write(ROWS, *batch(3))
    whole = bytes_of(tmp_path)
    for name, data, match in (
        ("header.json", b"{", "cannot be read"),
        ("header.json", b'{"version": -1}', "version -1"),
        ("header.json", b"[]", "cannot be read"),
        (
            "header.json",
            json.dumps({**json.loads(whole["header.json"]), "format": 2}).encode(),
            "format = 2",
        ),
        ("plans.bin", whole["plans.bin"][:-1], "139 bytes: need 140"),
        ("scores.bin", whole["scores.bin"] + b"0", "113 bytes"),
    ):
        put(tmp_path, {name: data})
        with pytest.raises(CheckpointError, match=match):
            opened(tmp_path)
        put(tmp_path, whole)
    put(tmp_path, {"plans.bin": whole["plans.bin"][:-4] + b"\xff\xff\x00\x00"})
    with pytest.raises(CheckpointError, match="plan id 65535"):
        opened(tmp_path).read(ROWS)
    (tmp_path / "moves.bin").unlink()
    with pytest.raises(CheckpointError, match="has no file: need 140"):
        opened(tmp_path)


def test_wrong_batches_change_nothing(tmp_path):
    store = opened(tmp_path)
    store.write(ROWS, *batch(3))
    plan, scores, moves = batch(4)
    for wrong, match in (
        ((ROWS + 1, plan), "need 0 to 6"),
        ((ROWS - 1, plan), "need 0 to 6"),
        ((ROWS, plan + 999), "plan id 1003"),
        ((ROWS, plan[:, :4]), "need integers"),
        ((ROWS, plan, scores[:, :3]), "scores of shape"),
        ((ROWS, plan[:6], scores, moves), "plans of shape"),
    ):
        with pytest.raises(CheckpointError, match=match):
            store.write(*wrong)
    with pytest.raises(CheckpointError, match="need 0 to 6"):
        store.read(torch.tensor([7]))
    with pytest.raises(CheckpointError, match="need at least 1"):
        opened(tmp_path / "none", examples=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        opened(tmp_path / "file" / "inside")
    assert said(store) == said(opened(tmp_path)) == [3]


def test_a_journal_counts_if_it_is_whole_and_of_this_store(tmp_path, monkeypatch):
    """Cut anywhere, or with any byte changed, it is dropped; whole, it is applied over tables that
    were reached in part."""
    store = opened(tmp_path)
    store.write(ROWS, *batch(3))
    before = bytes_of(tmp_path)
    with monkeypatch.context() as patch:  # as if killed when the journal was on the disk
        patch.setattr(Assignments, "_apply", lambda *_: None)
        store.write(ROWS, *batch(4))
    journal = (tmp_path / "journal.bin").read_bytes()
    assert len(journal) == 48 + 7 * (8 + 4 * (5 + 4 + 5 + 1))
    places = [*range(60), *range(60, len(journal), 7), len(journal) - 1]
    damaged = [journal[:cut] for cut in places]
    damaged += [journal[:at] + bytes([journal[at] ^ 1]) + journal[at + 1 :] for at in places]
    damaged += [journal + b"0", journal * 2, b"\xff" * 100]
    for data in damaged:
        put(tmp_path, before | {"journal.bin": data})
        assert said(opened(tmp_path)) == [3]
        assert bytes_of(tmp_path) == before, "and the tables are what they were"
    put(tmp_path, before | {"journal.bin": journal})
    assert said(opened(tmp_path)) == [4]
    after = bytes_of(tmp_path)
    for name in ("plans.bin", "scores.bin", "moves.bin", "steps.bin"):
        for cut in range(0, len(before[name]), 9):  # applied up to here
            put(
                tmp_path,
                before | {"journal.bin": journal, name: after[name][:cut] + before[name][cut:]},
            )
            assert said(opened(tmp_path)) == [4] and bytes_of(tmp_path) == after
    other = opened(tmp_path / "other", digest="others")
    (tmp_path / "other" / "journal.bin").write_bytes(journal)
    assert (
        not opened(tmp_path / "other", digest="others").assigned(ROWS).any()
        and not other.assigned(ROWS).any()
    )


def test_an_exception_while_applying_is_made_good_by_the_next_write(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.write(ROWS, *batch(3))
    with monkeypatch.context() as patch:
        patch.setattr(Assignments, "_apply", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.write(ROWS, *batch(4))
    store.write(ROWS[:1], *batch(5, 1))
    assert said(store) == said(opened(tmp_path)) == [4, 5]


def write_and_die(folder: Path, line: int) -> None:
    """Is killed when it comes to the `line`-th line of the store's code that a write runs."""
    store, left = opened(folder), [line]

    def trace(frame, event, argument):
        if frame.f_code.co_filename.endswith("store.py"):
            left[0] -= event == "line"
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    store.write(ROWS, *batch(4))
    store.finish_step()
    sys.settrace(None)


def test_killed_at_every_second_line_it_is_before_or_after(tmp_path):
    opened(tmp_path).write(ROWS, *batch(3))
    before, found = bytes_of(tmp_path), []
    for line in range(0, 300, 2):
        put(tmp_path, before)
        process = FORK.Process(target=write_and_die, args=(tmp_path, line))
        process.start()
        process.join()
        store = opened(tmp_path)
        found.append((said(store), store.version))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert [x for i, x in enumerate(found) if x not in found[:i]] == [
        ([3], 0),
        ([4], 0),
        ([4], 1),
    ] and found == sorted(found)
    assert process.exitcode == 0 and len(found) > 25


def write_on(folder: Path, rows: int, ready) -> None:
    store, value = Assignments.open(folder, SHAPE, rows, "many"), 0
    while True:
        value = (value + 1) % 1000
        store.write(torch.arange(rows), *batch(value, rows))
        ready.set()


def test_killed_at_any_time_it_is_before_or_after(tmp_path):
    """Tables of 90 KB, so that kills fall into the copying as well."""
    rows, met = 1500, set()
    for attempt in range(12):
        ready = FORK.Event()
        process = FORK.Process(target=write_on, args=(tmp_path, rows, ready))
        process.start()
        assert ready.wait(20)
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        met.update(
            found := said(Assignments.open(tmp_path, SHAPE, rows, "many"), torch.arange(rows))
        )
        assert len(found) == 1, "all rows are of one batch"
    assert len(met) > 1


def test_an_interrupted_creation_or_copy_counts_as_nothing(tmp_path):
    store = opened(tmp_path / "a")
    store.write(ROWS, *batch(3))
    store.finish_step()
    store.copy_to(tmp_path / "b")
    store.write(ROWS, *batch(4))
    copy = opened(tmp_path / "b")
    assert said(copy) == [3] and copy.version == 1 and said(store) == [4]
    copy.copy_to(tmp_path / "a")
    assert said(opened(tmp_path / "a")) == [3]
    (tmp_path / "b" / "header.json").unlink()
    (tmp_path / "b" / "plans.bin").write_bytes(b"half")
    assert not opened(tmp_path / "b").assigned(ROWS).any() and opened(tmp_path / "b").version == 0
