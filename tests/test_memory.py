"""Memory of a benchmark: what a job takes beside what is there, and a training step that leaves no
trace."""

import pytest
import torch

from families import text, tiny_base, tiny_online
from sememe.evaluation import memory, speed

CPU, MEGA = torch.device("cpu"), 2**20
on_linux = pytest.mark.skipif(
    memory.peak_bytes(CPU) is None or not memory.reset_peak(CPU), reason="nobody can tell here"
)


def small_blocks(megabytes: int) -> list[torch.Tensor]:
    """So small that the allocator keeps them when they are freed."""
    return [torch.ones(MEGA // 4 // 16) for _ in range(16 * megabytes)]


@on_linux
def test_a_job_is_charged_what_it_takes():
    before = torch.ones(64 * MEGA // 4)
    assert memory.extra_bytes(lambda: None, CPU) < 8 * MEGA, (
        "what was there before it is not its own"
    )
    # The kernel counts pages by the hundred: up to 0.2 MB of 32 were seen missing.
    assert 31 * MEGA <= memory.extra_bytes(lambda: torch.ones(32 * MEGA // 4), CPU) < 48 * MEGA
    assert before.sum() > 0


@on_linux
def test_what_was_freed_before_is_charged_again():
    for _ in range(2):  # pages of the first round would serve the second
        assert 32 * MEGA * 0.9 <= memory.extra_bytes(lambda: small_blocks(32), CPU) < 64 * MEGA


def test_peaks_are_weights_and_what_comes_beside(monkeypatch):
    pair = {"concept": torch.nn.Linear(8, 4), "base": torch.nn.Linear(8, 2)}
    pair["base"].tied = pair["base"].weight
    pair["concept"].register_buffer("seen", torch.zeros(3))
    extra = iter([100, 50, 100, None])
    monkeypatch.setattr(speed, "extra_bytes", lambda job, device: job() or next(extra))
    ran = []
    found = speed.peaks(pair, ran.append, CPU)
    assert ran == list(pair.values()), "each side once"
    assert found == {"concept": 4 * (36 + 3) + 100, "base": 4 * 18 + 50}
    assert speed.ratio(found) == pytest.approx(256 / 122)
    assert speed.ratio(speed.peaks(pair, lambda one: None, CPU)) is None, "nobody can tell"


def test_the_training_step_changes_no_weight(monkeypatch):
    model, seen = tiny_online().train(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step(model, ids, optimizer, real=speed.train_step):
        seen.append(len(optimizer.state))
        real(model, ids, optimizer)

    monkeypatch.setattr(speed, "train_step", step)
    speed.train_twice(model, text())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert seen[0] == 0 < seen[1] <= len(trained), (
        "the second step has the optimizer's state beside it"
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def test_prefill_is_at_least_its_weights():
    base = tiny_base()
    found = speed.benchmark_use(tiny_online(), base, text(1, 24), 4, 1)
    for side in ("concept", "base"):
        assert (found[side]["prefill_peak_bytes"] or float("inf")) >= found[side]["weight_bytes"]
    assert found["base"]["weight_bytes"] == 4 * sum(p.numel() for p in base.parameters()) + sum(
        b.nbytes for b in base.buffers()
    )
