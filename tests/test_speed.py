"""`sememe benchmark`: what is timed in turn and out of phase, what the figures are made of, the
file; and the grid of speeds in examples/: every point beside the base, nothing timed twice."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml

from conftest import byte_tokenizer, sememe
from families import compressor_over, online_over, text, tiny_base, tiny_online
from sememe.backbone.calling import CACHE
from sememe.errors import SememeError
from sememe.evaluation import batches, speed
from sememe.evaluation.subject import Options, Subject
from sememe.models.loading import load_base
from sememe.models.stepping import OnlineRows
from sememe.report import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
speed_grid = importlib.import_module("speed_grid")


@pytest.fixture(scope="module")
def model(base_folder):
    ids_NT = torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))
    return compressor_over(base_folder, ids_NT, codes_per_concept=2)


@pytest.fixture
def rounds(monkeypatch):
    """Seconds of each job in each round but the first, which is not to count."""
    seconds: list[list[float]] = []
    real, now = speed.alternate, [0.0]
    monkeypatch.setattr(speed, "clock", lambda: now[0])

    def timed(jobs, repeats):
        def slow(job, turns):
            job()
            now[0] += next(turns)

        slowed = [partial(slow, job, iter([99.0, *seconds.pop(0)])) for job in jobs]
        return real(slowed, repeats)

    monkeypatch.setattr(speed, "alternate", timed)
    return seconds


def test_figures_of_a_compressor_are_made_of_the_rounds(model, rounds):
    subject = Subject("", model, byte_tokenizer(), {}, Options(repeats=3, batch=4))
    concepts = model.compress(subject.prompts(None, 20, 4)["input_ids"])
    count = sum(map(len, model.decompress(concepts)))
    rounds += [[2, 4, 3], [8, 4, 6], [4, 2, 8], [5, 5, 20]]
    figures = speed.benchmark_compressor(subject, 20, None)
    concept, plain = figures["concept"], figures["base"]
    assert concept["read_seconds"] == {"median": 3, "min": 2, "max": 4, "rounds": [2, 4, 3]}
    assert figures["compress_base_forwards"] == pytest.approx(3 / 4)
    assert concept["read_tokens_per_s"] == 80 / 3 and plain["read_tokens_per_s"] == 80 / 4
    steps = -(-count // 4)
    assert plain["tokens_written"] == 4 * steps >= count == concept["tokens_written"]
    assert figures["decompress_speedup"] == pytest.approx(count / (4 * steps) * 5 / 6)
    assert figures["compression_ratio"] == 80 / (2 * sum(map(len, concepts)))


def test_figures_of_an_online_model_in_a_ragged_batch(rounds):
    base, model = tiny_base(), tiny_online(boundary="fixed", rate=0.25)
    subject = Subject("", model, byte_tokenizer(), {}, Options())
    prompts = {name: x % 97 for name, x in subject.prompts(None, 200, 4).items()}
    lengths = prompts["attention_mask"].sum(1)
    assert len(set((lengths % 4).tolist())) == 4 and lengths.min() >= 100
    cache = model.new_cache(4)
    model.generate(**prompts, max_new_tokens=8, min_new_tokens=8, **{CACHE: cache})
    steps = (cache.concept_ids[:, 200:] != -1).sum(0)
    assert steps.tolist() == [1] * 7, "a concept every 4 tokens, of another row in each step"
    rounds += [[1.0], [2.0], [5.0], [8.0]]
    figures = speed.benchmark_online(model, base, prompts, Options(new_tokens=4, repeats=1))
    assert figures["prefill_speedup"] == 2 and figures["decode_speedup"] == 6 / 4
    assert figures["concept"]["prefill_tokens_per_s"] == int(lengths.sum())
    assert figures["base"]["decode_tokens_per_s"] == 4 * 3 / 6
    weights = 4 * sum(p.numel() for p in base.parameters()) + sum(b.nbytes for b in base.buffers())
    assert figures["base"]["weight_bytes"] == weights
    assert figures["concept"]["cache_bytes"] > 0 and figures["cache_reduction"] > 0
    assert figures["realised_rate"] == pytest.approx(0.25, abs=0.01)
    assert torch.cuda.is_available() or figures["prefill_memory_ratio"] is None


def sweep_subject(monkeypatch, **options) -> Subject:
    model = tiny_online(boundary="null", rate=0.25, max_tail=16)
    monkeypatch.setattr(Subject, "load_base", lambda self: tiny_base())

    def prompts(self, data, length, batch):
        return {"input_ids": text(12, 200)[:batch, :length]}

    monkeypatch.setattr(Subject, "prompts", prompts)
    return Subject("", model, byte_tokenizer(), {}, Options(new_tokens=24, sweep=True, **options))


def test_rows_in_phase_write_together_and_others_do_not(monkeypatch):
    subject = sweep_subject(monkeypatch)
    texts, starts = batches.texts_of(subject, None, 48, 120, 12)
    prompts = [48 - start for start in starts]
    assert {x % 4 for x in prompts} == {0, 1, 2, 3} and min(prompts) > 24 and max(prompts) == 48
    assert {len(x) - n for x, n in zip(texts, prompts, strict=True)} == {120}
    step, writers = OnlineRows.step, []

    def spied(rows, tokens, *hold):
        out = step(rows, tokens, *hold)
        writers.append(sum(concept != -1 for concept in out.concept_n))
        return out

    monkeypatch.setattr(OnlineRows, "step", spied)

    def steps(texts, prompts, hold=batches.NONE) -> list[int]:
        job = batches.Stepping(subject.model, texts, prompts, 24, hold)
        job()
        first, writers[:] = [*writers], []
        job()
        second, writers[:] = [*writers], []
        assert first == second, "the same tokens after the same prompts"
        return first

    together, apart = steps([texts[0]] * 12, [48] * 12), steps(texts, prompts)
    assert {*together} == {0, 12} and len(together) == len(apart) == 24
    assert any(0 < count < 12 for count in apart)
    held = steps(texts, prompts, (6, 4))
    runs = [sum(map(bool, counts)) for counts in (apart, held)]
    assert runs[1] < runs[0] / 1.5 and max(held) >= 6, "the middle layers run less often"


def test_figures_of_batches_are_made_of_the_rounds(rounds, monkeypatch):
    subject = sweep_subject(monkeypatch, repeats=1, batch=12)
    monkeypatch.setattr(batches, "alternate", speed.alternate)
    policy = {1: batches.NONE, 4: batches.NONE, 12: (9, 2)}
    monkeypatch.setattr(batches, "measured_policy", lambda model: lambda rows, rate: policy[rows])
    rounds += [[1.0], [2.0], [4.0]] * 2 + [[6.0], [2.0], [4.0], [3.0]]
    figures = batches.sweep_batches(subject, 16, None)
    one, four, twelve = figures["batches"]
    assert [x["batch"] for x in (one, four, twelve)] == [1, 4, 12]
    assert (four["in_phase_speedup"], four["out_of_phase_speedup"]) == (0.5, 0.25)
    assert four["held_speedup"] is four["hold_gain"] is None and one["base_tokens_per_s"] == 24
    assert twelve["held_tokens_per_s"] == 12 * 24 / 3 and twelve["held_speedup"] == 2
    assert twelve["hold_gain"] == pytest.approx(4 / 3) and twelve["hold"] == [9, 2]
    assert twelve["engine_holds"] and not one["engine_holds"]
    assert figures["settings"]["target_rate"] == 0.25 and figures["base_name"] == "tiny"
    with pytest.raises(SememeError, match=r"need 1 to 184\. try: --prompt-tokens 184"):
        subject.model.config.base = "tiny"
        batches.sweep_batches(subject, 200, None)


def test_timing_of_training_leaves_the_model_as_it_was(base_folder):
    model = online_over(base_folder, text(16, 24))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    subject = Subject("", model, byte_tokenizer(), {}, Options(repeats=1))
    assert speed.benchmark_training(subject, text())["train_step_ratio"] > 0
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_greedy_is_what_the_base_generates(base_folder):
    base, ids = load_base(base_folder).eval(), torch.tensor([[5], [9]])
    want = base.generate(ids, max_new_tokens=9, do_sample=False)
    assert want.shape == (2, 10), "no end of text among them"
    assert torch.equal(speed.greedy(base, ids, 9), want[:, 9:])


def test_benchmark_prints_keeps_and_is_drawn(model, texts, tmp_path):
    run, data = tmp_path / "r", {"train": str(texts[0]), "heldout": str(texts[1])}
    for saved in (model, byte_tokenizer()):
        saved.save_pretrained(run / "model")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    recipe = {"system": "compressor", "data": data, "sequence_length": 20}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def figures(*words) -> tuple[dict, str]:
        printed = sememe("benchmark", *words, "--repeats", 2, "--json", tmp_path / "b.json")
        return json.loads((tmp_path / "b.json").read_text()), printed

    found, printed = figures(run)
    assert json.loads((run / "benchmark.json").read_text()) == found
    want = {"window": 20, "batch": 16, "repeats": 2, "prompts": "text", "target_rate": 0.5}
    assert found["settings"] | want == found["settings"] and found["model"] == str(run)
    assert {len(found[side]["write_seconds"]["rounds"]) for side in ("concept", "base")} == {2}
    assert "decompress_speedup" in printed and "compression_ratio" in printed
    assert "compress_base_forwards" in write_report(run).read_text()
    other, _ = figures(run / "model", "--prompt-tokens", 12, "--batch", 2, "--rate", 1)
    assert other["realised_rate"] == 1
    assert other["compression_ratio"] == 0.5, "two ids a concept, both counted"
    assert json.loads((run / "benchmark.json").read_text()) == found
    refused = sememe("benchmark", run, "--prompt-tokens", 300, code=1)
    assert "need 1 to 255. try: --prompt-tokens 255" in refused


def test_points_are_written_as_they_come_and_not_timed_again(
    base_folder, tmp_path, monkeypatch, capsys
):
    class Llama:
        def __init__(self, **options):
            assert options["n_ctx"] == 22

        reset, generate = Mock(), Mock(side_effect=lambda ids, temp: iter(ids * 2))

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    out = tmp_path / "grid.json"
    words = f"{base_folder} --prompt-lengths 16 --batches 1 2 --rates 0.5 --new-tokens 6"
    words += f" --repeats 1 --splits 1/2/1 2/2/2 --gguf x.gguf --out {out}"
    options = speed_grid.parser.parse_args(words.split())
    results = speed_grid.main(options)
    assert json.loads(out.read_text()) == results and len(results) == 5
    kept = {name: point for name, point in results.items() if "2/2/2" not in name}
    rates = [point["realised_rate"] for name, point in kept.items() if "1/2/1" in name]
    assert rates == pytest.approx([0.5, 0.5], abs=0.07)
    assert all("need" in results[name]["fault"] for name in results.keys() - kept.keys())
    printed = capsys.readouterr().out
    assert "decode_speedup" in printed and "llama.cpp, prompt 16" in printed
    again = speed_grid.main(options)
    assert again | kept == again and again.keys() == results.keys(), "nothing is timed twice"
