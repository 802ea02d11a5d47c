"""Instruments: every figure against a naive count, and that looking changes nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import run
from families import text, tiny_base, tiny_online
from sememe.data import TextBlocks
from sememe.evaluation.quality import BUCKET
from sememe.models import ControlConfig, ControlForCausalLM
from sememe.models.online import NULL
from sememe.training import meters
from sememe.training.meters import ConceptMeter, gradient_norms, head_figures, heldout_figures
from sememe.training.trainer import ConceptTrainer

ALWAYS = """step tokens seconds step_tokens_per_s loss learning_rate rate
longest_tail tail_mean target_rate quantise
grad_norm grad_norm_lora grad_norm_head grad_norm_codes grad_norm_bridge
code_perplexity codes_used largest_code_share bits_per_concept skipped_steps"""
HELDOUT = "heldout_nll heldout_nll_by_position heldout_rate heldout_tail_mean"
ABLATED = """delta_nll_zero delta_nll_shuffle delta_nll_random code_entropy code_max_prob
soft_hard_cosine soft_hard_distance"""


def some_ids(seed: int, top: int) -> torch.Tensor:
    """(3, 40) concept ids: the sink unquantised, most positions NULL, a skewed choice of codes
    below `top`."""
    generator = torch.Generator().manual_seed(seed)
    skewed = (torch.rand(3, 40, generator=generator) ** 3 * top).long()
    ids = torch.where(torch.rand(3, 40, generator=generator) < 0.4, skewed, NULL)
    ids[:, 0] = -2
    return ids


def naive_tails(ids: torch.Tensor) -> tuple[list[int], int]:
    """Tails of closed segments, and the longest run of NULLs, row by row."""
    rows = ["".join("." if one == NULL else "x" for one in row) for row in ids.tolist()]
    closed = [len(run) for row in rows for run in row.split("x")[1:-1]]
    return closed, max(len(run) for row in rows for run in row.split("x"))


def naive_entropy(values: list[int]) -> float:
    shares = [values.count(value) / len(values) for value in set(values)]
    return -sum(p * math.log(p) for p in shares)


def counted(*batches: torch.Tensor, codes: int) -> ConceptMeter:
    meter = ConceptMeter(7, codes)
    for ids in batches:
        meter.see(SimpleNamespace(concept_ids=ids), None)
    return meter


@pytest.mark.parametrize("codes", [1, 3])
def test_meter_is_the_naive_count_over_all_ranks(codes, monkeypatch):
    """A stand-in hands over the other rank's ids: the figures are those of both texts together."""
    here, *there = (some_ids(seed, 7**codes) for seed in (0, 1, 2))
    every = [one for ids in (here, *there) for one in ids.flatten().tolist()]
    digit = [[one // 7**g % 7 for one in every if one >= 0] for g in range(codes)]
    closed, longest = naive_tails(torch.cat([here, *there]))
    want = {
        "rate": sum(one != NULL for one in every) / len(every),
        "longest_tail": longest,
        "tail_mean": sum(closed) / len(closed),
        "code_perplexity": math.exp(naive_entropy(digit[0])),
        "codes_used": len(set(digit[0])),
        "largest_code_share": max(map(digit[0].count, digit[0])) / len(digit[0]),
        "bits_per_concept": sum(map(naive_entropy, digit)) / math.log(2),
    }  # 1e-7: shares are float32
    meter = counted(here, *there, codes=codes)
    assert meter.read() == pytest.approx(want, rel=1e-7)
    meter.see(SimpleNamespace(concept_ids=torch.tensor([[-2, NULL, NULL]])), None)
    assert meter.read() == {"rate": pytest.approx(1 / 3), "longest_tail": 2}, (
        "a reading starts the next interval; no code and no closed segment: no figure"
    )

    def gather(ranks, own):
        ranks[:] = [own, [torch.cat(there)]]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert counted(here, codes=codes).read() == pytest.approx(want, rel=1e-7)


def test_gradient_norms_are_those_of_the_modules():
    model = tiny_online(bridge=True).train()
    model(input_ids=text(), labels=text()).loss.backward()
    found = gradient_norms(model)
    assert set(found) == {"lora", "head", "codes", "bridge"}
    for part, norm in found.items():
        pattern = "lora_" if part == "lora" else f".{part}."
        mine = [p for name, p in model.named_parameters() if pattern in f".{name}"]
        flat = torch.cat([p.grad.flatten() for p in mine if p.grad is not None])
        assert norm == pytest.approx(float(flat.norm()), rel=1e-5) and norm > 0


def blocks(ids: torch.Tensor) -> TextBlocks:
    return TextBlocks(ids, torch.ones_like(ids), None)


def test_heldout_figures_are_the_naive_ones(monkeypatch):
    """T = 100 gives two buckets, and ablations are measured on two blocks of the four, compared
    with the same tokens unablated; 1e-4 is float32 in another order of sums (5e-6 seen)."""
    model, ids = tiny_online(max_position_embeddings=128), text(4, 100)
    monkeypatch.setattr(meters, "SMALL_BATCH", 200)
    found = heldout_figures(model, blocks(ids))

    @torch.no_grad()
    def nll(rows: int, kind: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(input_ids=ids[:rows], ablation=kind)
        log_p = F.log_softmax(out.logits[:, :-1].double(), -1)
        return -log_p.gather(2, ids[:rows, 1:, None]).squeeze(2), out.concept_ids

    plain, concepts = nll(4)
    small = {kind: nll(2, kind)[0].mean() for kind in ("zero", "shuffle", "random")}
    closed, _ = naive_tails(concepts)
    want = {f"delta_nll_{kind}": float(x - plain[:2].mean()) for kind, x in small.items()} | {
        "heldout_nll": float(plain.mean()),
        "heldout_rate": float((concepts != NULL).double().mean()),
        "heldout_tail_mean": sum(closed) / len(closed),
    }
    assert {key: found[key] for key in want} == pytest.approx(want, abs=1e-4)
    assert abs(found["delta_nll_zero"]) > 1e-3, "the ablation must have done something"
    assert abs(plain.mean() - plain[:2].mean()) > 1e-3, "the small batch is another text"
    want = [float(bucket.mean()) for bucket in plain.split(BUCKET, 1)]
    assert found["heldout_nll_by_position"] == pytest.approx(want, abs=1e-4)


HEADS = {"code_temperature": 7.0}, {"head": "joint"}, {"boundary": "fixed", "codes_per_concept": 2}


@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_head_figures_are_the_naive_ones(settings):
    """State by state; 1e-4 is float32 in another order of sums (2e-6 seen)."""
    model, ids = tiny_online(**settings), text(3, 24)
    found = head_figures(model, ids)
    codes, naive = model.writer.codes, []
    with torch.no_grad():
        written, states = model(input_ids=ids).concept_ids, model.shallow_states(ids)
        for row, t in (written >= 0).nonzero().tolist():
            x, entropy, surest = codes.normalise(states[row, t]), 0.0, 0.0
            soft = hard = torch.zeros_like(x)
            for g in range(codes.codes_per_concept):
                table = codes.table(g)
                logits = model.writer.head.code_logits((x - hard).unsqueeze(0), table, g)[0]
                p = torch.softmax(logits.double() / model.config.code_temperature, 0)
                entropy -= float((p * p.log()).nan_to_num().sum())
                surest += float(p.max()) / codes.codes_per_concept
                soft, hard = soft + (p.float() @ table), hard + table[logits.argmax()]
            cosine = F.cosine_similarity(soft, hard, dim=0)
            distance = (soft - hard).norm() / hard.norm()
            naive.append((entropy, surest, float(cosine), float(distance)))
    assert len(naive) > 10
    means = [sum(column) / len(naive) for column in zip(*naive, strict=True)]
    keys = ("code_entropy", "code_max_prob", "soft_hard_cosine", "soft_hard_distance")
    assert found == pytest.approx(dict(zip(keys, means, strict=True)), abs=1e-4)
    assert found["code_entropy"] > 0.01 and found["soft_hard_distance"] > 0.01, "no constants"


def test_codes_are_not_measured_before_there_are_any():
    model = tiny_online()
    model.dial.quantise = 0.0
    assert set(heldout_figures(model, blocks(text()))) == set(HELDOUT.split())
    base = tiny_base()
    config = ControlConfig(text_config=base.config, base="tiny", lora_rank=4)
    control = ControlForCausalLM(config, base).eval()
    assert set(heldout_figures(control, blocks(text()))) == set(HELDOUT.split()[:2])
    sinks_only = tiny_online(boundary="fixed", rate=0.03, max_tail=60)
    assert head_figures(sinks_only, text()) == {}, "no coded concept: no figure"


def test_looking_changes_nothing():
    """Else a run with other `heldout_every` would be another run."""
    model = tiny_online(gumbel=1.0, concept_dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    heldout_figures(model, blocks(text()))
    assert torch.equal(torch.get_rng_state(), random) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_logs_what_it_measures_and_norms_are_those_before_clipping(
    recipe_values, tmp_path, monkeypatch
):
    """Gradients made 100 times as long are clipped, and norms are those of before (1e-5: sums in
    another order)."""
    real = ConceptTrainer._clip_grad_norm

    def enlarge(self, model):
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= 100
        return real(self, model)

    monkeypatch.setattr(ConceptTrainer, "_clip_grad_norm", enlarge)
    values = {**recipe_values, "steps": 9, "bridge": True, "quantise": [0, 0.5]}
    lines = run(values, tmp_path / "r")
    assert [line["step"] for line in lines] == list(range(1, 10))
    for line in lines[1:]:  # the first step has no codes yet
        measured = f"{HELDOUT} {ABLATED}" if line["step"] in (4, 8, 9) else ""
        want = {*ALWAYS.split(), *measured.split()}
        assert set(line) == want, set(line) ^ want
        norms = [line[key] for key in want if key.startswith("grad_norm_")]
        assert min(norms) > 1e-3 and line["grad_norm"] > 1
        assert math.hypot(*norms) == pytest.approx(line["grad_norm"], rel=1e-5)
