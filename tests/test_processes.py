"""Several processes train as one, whether or not they share the base's layers, and what they write
is resumed from by any number of them."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from conftest import launch, metrics, run
from plan_runs import planner_recipe, write_pairs
from sememe.concepts import gate
from sememe.training.checkpoints import last_checkpoint
from sememe.training.trainer import ConceptTrainer

# Sums of parts are rounded otherwise than those of the whole: 1e-6 of losses seen. A quantile, a
# row or a token that is counted twice or not at all moves them by 1e-3.
SAME = 1e-5
QUIET = {"lora": {"rank": 4}, "batch_size": 4}
"""Nothing is drawn, since each process draws for itself."""


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines]


def finished(values: dict, folder: Path, processes: int, *options: str) -> str:
    """What a run said; it has to end well."""
    process = launch(values, folder, processes, *options)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def take_back(folder: Path, checkpoint: str) -> None:
    """As if the run had been killed after the checkpoint before that one."""
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / checkpoint)


def test_two_processes_track_the_scores_of_both(recipe_values, tmp_path):
    """Every figure is over both, too."""
    values = recipe_values | QUIET
    one = run(values, tmp_path / "one")
    finished(values, tmp_path / "two", 2)
    two = metrics(tmp_path / "two")
    for key in ("loss", "rate", "longest_tail", "grad_norm", "heldout_nll", "tokens"):
        figures = ([line[key] for line in lines if key in line] for lines in (one, two))
        assert next(figures) == pytest.approx(next(figures), abs=SAME), key


def test_two_processes_share_the_base_and_one_goes_on(recipe_values, tmp_path, monkeypatch):
    """Also where one rank's text writes no coded concept: max_tail and a rate so low that a row of
    32 tokens holds the sink alone."""
    few = {"rate": 0.03, "max_tail": 40, "boundary": "fixed", "quantise": [0, 0]}
    values, texts = recipe_values | QUIET | few, []
    real = ConceptTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        texts.append(inputs["input_ids"].tolist())
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ConceptTrainer, "compute_loss", spy)
    one = run(values, tmp_path / "one")
    said = finished(values, tmp_path / "two", 2, "--sharded")
    assert losses(metrics(tmp_path / "two")) == pytest.approx(losses(one), abs=SAME)
    own, total = re.search(r"([\d.]+) of the ([\d.]+) MiB", said).groups()
    assert float(own) == pytest.approx(float(total) / 2, rel=0.05)
    take_back(tmp_path / "two", "checkpoint-8")
    resumed = run(values, tmp_path / "two")
    assert losses(resumed) == pytest.approx(losses(one), abs=SAME)
    assert texts[8:] == texts[4:8], "the texts of steps 5 to 8 again, in their order"


def test_quantiles_are_of_all_ranks(monkeypatch):
    """A stand-in hands over another rank's scores, more of them."""
    own_N, other_N = torch.randn(5), torch.randn(7) + 3
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(gate.dist, name, lambda value=value: value)
    monkeypatch.setattr(gate.dist, "all_reduce", lambda sizes: sizes.copy_(torch.tensor([5, 7])))

    def all_gather(parts, x_n):
        parts[0].copy_(x_n)
        parts[1].copy_(other_N)

    monkeypatch.setattr(gate.dist, "all_gather", all_gather)
    assert torch.equal(gate.of_all_ranks(own_N), torch.cat([own_N, other_N]))


# ---- minutes: every system, four processes ----


@pytest.fixture(params=("online", "control", "prune", "compressor", "planner"))
def of_system(request, base_folder, recipe_values, tmp_path) -> dict:
    if request.param == "planner":
        values = planner_recipe(base_folder, write_pairs(tmp_path))
        values["plan"] |= {"signals": 0.5}
        values["em"]["batch"] = 3
    else:
        values = recipe_values | ({"leave_out": 1} if request.param == "prune" else {})
    size = {"steps": 50, "save_every": 20, "heldout_every": 50, "quantise": [0.2, 0.6]}
    return values | QUIET | size | {"system": request.param}


@pytest.mark.reliability
@pytest.mark.parametrize("options", [(), ("--sharded",)], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_trains_as_one(of_system, tmp_path, processes, options):
    one = run(of_system, tmp_path / "one")
    finished(of_system, tmp_path / "more", processes, *options)
    assert losses(metrics(tmp_path / "more")) == pytest.approx(losses(one), abs=SAME)


@pytest.mark.reliability
@pytest.mark.parametrize("processes", [1, 4])
def test_two_processes_that_were_stopped_go_on_in_any_number(of_system, tmp_path, processes):
    one = run(of_system, tmp_path / "one")
    process = launch(of_system, tmp_path / "more", 2, "--sharded")
    while process.poll() is None and last_checkpoint(tmp_path / "more" / "checkpoints") is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    said = finished(of_system, tmp_path / "more", processes)
    assert int(re.search(r"resuming from step (\d+) of 50", said)[1]) >= 20
    assert losses(metrics(tmp_path / "more")) == pytest.approx(losses(one), abs=SAME)
