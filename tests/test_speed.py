"""`sememe benchmark`: what is timed in turn, what the figures are made of, the file, what is
refused."""

import json
import re

import pytest
import torch
import yaml

from conftest import byte_tokenizer, sememe
from families import compressor_over, text, tiny_base, tiny_online
from sememe.evaluation import speed
from sememe.models.loading import load_base
from sememe.report import write_report


@pytest.fixture(scope="module")
def model(base_folder):
    ids_NT = torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))
    return compressor_over(base_folder, ids_NT, codes_per_concept=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, texts):
    """A run folder of a compressor as `train` leaves it, without the training."""
    folder = tmp_path_factory.mktemp("speed") / "r"
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    data = {"train": str(texts[0]), "heldout": str(texts[1])}
    recipe = {"system": "compressor", "data": data, "sequence_length": 20}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what jobs add to it."""
    now = [0.0]
    monkeypatch.setattr(speed, "clock", lambda device: now[0])
    return now


def test_jobs_take_turns_and_every_round_but_the_first_counts(clock):
    order: list[str] = []
    rounds = {"a": iter([100, 1, 5, 3]), "b": iter([200, 2, 2, 8])}

    def job(name: str) -> None:
        order.append(name)
        clock[0] += next(rounds[name])

    jobs = {name: lambda name=name: job(name) for name in rounds}
    seconds = speed.alternate(jobs, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4 and seconds == {"a": [1, 5, 3], "b": [2, 2, 8]}
    assert speed.summary(seconds["a"]) == {"median": 3, "min": 1, "max": 5}
    assert speed.ratio_of(seconds, "a", "b") == (3 / 2, [1 / 8, 5 / 2])


def test_figures_of_a_compressor_are_made_of_the_rounds(model, base_folder, monkeypatch):
    base, ids = load_base(base_folder).eval(), text(4, 20)
    concepts = model.compress(ids)
    count = sum(map(len, model.decompress(concepts)))
    seconds = {
        "compress": [2, 3, 4],
        "decompress": [8, 4, 6],
        "forward": [4, 2, 8],
        "states": [1, 1, 2],
        "greedy": [5, 5, 20],
    }
    monkeypatch.setattr(speed, "alternate", lambda jobs, *rest: {job: seconds[job] for job in jobs})
    figures = speed.benchmark_compressor(model, base, ids, 3)
    concept, plain = figures["concept"], figures["base"]
    assert concept["read_seconds"] == {"median": 3, "min": 2, "max": 4, "rounds": [2, 3, 4]}
    assert plain["states_seconds"]["median"] == 1
    assert figures["compress_base_forwards"] == 3 / 4
    assert figures["compress_base_forwards_range"] == [2 / 8, 4 / 2]
    assert figures["compress_base_forwards_no_logits"] == 3
    assert concept["read_tokens_per_s"] == 80 / 3 and plain["read_tokens_per_s"] == 80 / 4
    steps = -(-count // 4)
    assert plain["tokens_written"] == 4 * steps >= count == concept["tokens_written"]
    share = count / (4 * steps)
    assert figures["decompress_speedup"] == pytest.approx(share * 5 / 6)
    assert figures["decompress_speedup_range"] == pytest.approx([share * 5 / 8, share * 20 / 4])
    assert figures["compression_ratio"] == 80 / (2 * sum(map(len, concepts)))


def test_figures_of_an_online_model():
    base, ids = tiny_base(), text(2, 24)
    figures = speed.benchmark_online(tiny_online(), base, ids, 4, 1)
    weights = 4 * sum(p.numel() for p in base.parameters()) + sum(b.nbytes for b in base.buffers())
    assert figures["base"]["weight_bytes"] == weights
    assert figures["concept"]["cache_bytes"] > 0 and figures["cache_reduction"] > 0
    if not torch.cuda.is_available():
        assert figures["prefill_memory_ratio"] is figures["base"]["prefill_peak_bytes"] is None


def test_the_training_step_changes_no_weight(monkeypatch):
    model, optimizer_states = tiny_online().train(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step(model, ids, optimizer, real=speed.train_step):
        optimizer_states.append(len(optimizer.state))
        real(model, ids, optimizer)

    monkeypatch.setattr(speed, "train_step", step)
    speed.train_twice(model, text())
    assert optimizer_states[0] == 0 < optimizer_states[1], "the second step has AdamW's state"
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def test_greedy_is_what_the_base_generates(base_folder):
    base, options = load_base(base_folder).eval(), {"max_new_tokens": 9, "do_sample": False}
    want = base.generate(torch.full((2, 1), 5), attention_mask=torch.ones(2, 1), **options)
    assert want.shape == (2, 10), "no end of text among them"
    assert torch.equal(speed.greedy(base, 5, 2, 9), want[:, 1:])


def test_benchmark_prints_keeps_and_is_drawn(run, tmp_path):
    words = ("--repeats", 2, "--json", tmp_path / "b.json")
    # The title breaks where the run's path is long.
    printed = " ".join(sememe("benchmark", run, *words).split())
    figures = json.loads((tmp_path / "b.json").read_text())
    assert json.loads((run / "benchmark.json").read_text()) == figures
    want = {"window": 20, "batch": 16, "repeats": 2, "prompts": "text", "target_rate": 0.5}
    assert figures["settings"] | want == figures["settings"] and figures["model"] == str(run)
    for side in ("concept", "base"):
        assert len(figures[side]["write_seconds"]["rounds"]) == 2
    low, high = figures["compress_base_forwards_range"]
    assert 0 < low <= figures["compress_base_forwards"] <= high
    for word in ("decompress_speedup", "compression_ratio"):
        assert word in printed, word
    assert "compress_base_forwards" in write_report(run).read_text()
    sememe("benchmark", run / "model", "--prompt-tokens", 12, "--batch", 2, "--rate", 1, *words)
    other = json.loads((tmp_path / "b.json").read_text())
    assert other["realised_rate"] == 1
    assert other["compression_ratio"] == 0.5, "two ids a concept, both counted"
    assert json.loads((run / "benchmark.json").read_text()) == figures


@pytest.mark.parametrize(
    "words, message",
    [
        (("--prompt-tokens", "300"), "got 300 tokens .*need 1 to 255.*try: --prompt-tokens 255"),
        (("--rate", "0.1"), "max_tail = 3"),
        (("--data", "none.txt"), "none.txt"),
    ],
)
def test_bad_input_is_one_sentence(run, words, message):
    printed = sememe("benchmark", run, *words, code=1)
    assert re.search(message, printed), printed
    assert "try: " in printed and "\n" not in printed
