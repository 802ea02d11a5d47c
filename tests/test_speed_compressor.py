"""`sememe benchmark` of a compressor: what is timed in turn, what the figures are made of, the
file, what is refused."""

import json
import re

import pytest
import torch
import yaml

from conftest import byte_tokenizer, sememe
from families import compressor_over
from sememe.evaluation import speed, speed_compressor
from sememe.evaluation.speed_compressor import benchmark_compressor, greedy, is_compressor, ratio_of
from sememe.models.loading import load_base
from sememe.report import write_report


def blocks() -> torch.Tensor:
    return torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model(base_folder):
    return compressor_over(base_folder, blocks(), codes_per_concept=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, texts):
    """A run folder as `train` leaves it, without the training."""
    folder = tmp_path_factory.mktemp("speed") / "r"
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "system": "compressor",
                "data": {"train": str(texts[0]), "heldout": str(texts[1])},
                "sequence_length": 20,
            }
        )
    )
    return folder


@pytest.fixture
def by_hand(monkeypatch):
    """A clock that stands still but for what jobs add to it."""
    now = [0.0]
    monkeypatch.setattr(speed, "clock", lambda device: now[0])
    return now


def takes(now: list[float], seconds: list[float], order: list[str], name: str):
    left = iter(seconds)

    def job():
        order.append(name)
        now[0] += next(left)

    return job


def test_jobs_take_turns_and_every_round_but_the_first_counts(by_hand):
    order: list[str] = []
    jobs = {
        "a": takes(by_hand, [100, 1, 5, 3], order, "a"),
        "b": takes(by_hand, [200, 2, 2, 8], order, "b"),
    }
    found = speed.in_turn(jobs, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4 and found == {"a": [1, 5, 3], "b": [2, 2, 8]}
    assert speed_compressor.timed(found["a"]) == {
        "median": 3,
        "min": 1,
        "max": 5,
        "rounds": [1, 5, 3],
    }
    assert ratio_of(found, "a", "b") == (3 / 2, [1 / 8, 5 / 2])


def test_figures_are_made_of_the_rounds(model, base_folder, by_hand, monkeypatch):
    base, ids, order = load_base(base_folder).eval(), blocks()[:4, :20], []
    concepts, written = model.compress(ids), model.decompress(model.compress(ids))
    count = sum(map(len, written))
    seconds = {
        "compress": [0, 9, 2, 3, 4],
        "decompress": [0, 9, 8, 4, 6],
        "forward": [9, 4, 2, 8],
        "states": [9, 1, 1, 2],
        "greedy": [9, 5, 5, 20],
    }
    jobs = {name: takes(by_hand, found, order, name) for name, found in seconds.items()}
    real, drawn = base.forward, []

    def forward(**given):
        assert given["input_ids"] is ids and not given["use_cache"]
        jobs["states" if given["logits_to_keep"] else "forward"]()
        return real(**given)

    def write(base, bos, rows, steps):
        drawn.append((bos, rows, steps))
        jobs["greedy"]()

    monkeypatch.setattr(base, "forward", forward)
    monkeypatch.setattr(speed_compressor, "greedy", write)
    monkeypatch.setattr(model, "compress", lambda given: (jobs["compress"](), concepts)[1])
    monkeypatch.setattr(model, "decompress", lambda given: (jobs["decompress"](), written)[1])
    ticks: list[int] = []
    found = benchmark_compressor(model, base, ids, 3, lambda: ticks.append(1))
    assert (
        order
        == ["compress", "decompress"]
        + ["compress", "forward", "states"] * 4
        + ["decompress", "greedy"] * 4
    )
    assert len(ticks) == speed_compressor.JOBS * 4
    concept, plain = found["concept"], found["base"]
    assert concept["read_seconds"] == {"median": 3, "min": 2, "max": 4, "rounds": [2, 3, 4]}
    assert plain["read_seconds"]["rounds"] == [4, 2, 8] and plain["states_seconds"]["median"] == 1
    assert found["compress_base_forwards"] == 3 / 4 and found["compress_base_forwards_range"] == [
        2 / 8,
        4 / 2,
    ]
    assert found["compress_base_forwards_no_logits"] == 3
    assert concept["read_tokens_per_s"] == 80 / 3 and plain["read_tokens_per_s"] == 80 / 4
    steps = -(-count // 4)
    assert (
        set(drawn) == {(model.bos, 4, steps)}
        and plain["tokens_written"] == 4 * steps >= count == concept["tokens_written"]
    )
    assert (
        concept["write_tokens_per_s"] == count / 6 and plain["write_tokens_per_s"] == 4 * steps / 5
    )
    assert found["decompress_speedup"] == pytest.approx(
        concept["write_tokens_per_s"] / plain["write_tokens_per_s"]
    )
    least, most = found["decompress_speedup_range"]
    assert least == pytest.approx(5 / 8 * count / (4 * steps)) and most == pytest.approx(
        20 / 4 * count / (4 * steps)
    )
    ids_written = 2 * sum(map(len, concepts))
    assert (
        found["compression_ratio"] == 80 / ids_written
        and found["realised_rate"] == ids_written / 160
    )


def test_greedy_is_what_the_base_generates(base_folder):
    base = load_base(base_folder).eval()
    want = base.generate(
        torch.full((2, 1), 5), attention_mask=torch.ones(2, 1), max_new_tokens=9, do_sample=False
    )
    assert want.shape == (2, 10), "no end of text among them"
    assert torch.equal(greedy(base, 5, 2, 9), want[:, 1:])


def test_benchmark_prints_keeps_and_is_drawn(run, tmp_path):
    words = ("--repeats", 2, "--json", tmp_path / "b.json")
    printed = " ".join(
        sememe("benchmark", run, *words).split()
    )  # the title breaks where the run's path is long
    found = json.loads((tmp_path / "b.json").read_text())
    assert json.loads((run / "benchmark.json").read_text()) == found
    assert (
        found["settings"] | {"window": 20, "batch": 16, "repeats": 2, "prompts": "text"}
        == found["settings"]
    )
    assert found["settings"]["target_rate"] == 0.5 and found["model"] == str(run)
    for side in ("concept", "base"):
        for kind in ("read", "write"):
            assert (
                found[side][f"{kind}_tokens_per_s"] > 0
                and len(found[side][f"{kind}_seconds"]["rounds"]) == 2
            )
    assert found["concept"]["weight_bytes"] > found["base"]["weight_bytes"]
    least, most = found["compress_base_forwards_range"]
    assert 0 < least <= found["compress_base_forwards"] <= most
    for word in (
        "compress_base_forwards",
        "decompress_speedup",
        "compression_ratio",
    ):
        assert word in printed, word
    page = write_report(run).read_text()
    assert "compress_base_forwards" in page and "decompress</th>" in page
    sememe("benchmark", run / "model", "--prompt-tokens", 12, "--batch", 2, "--rate", 1, *words)
    other = json.loads((tmp_path / "b.json").read_text())
    assert (
        other["settings"]
        | {"window": 12, "batch": 2, "target_rate": 1.0, "prompts": "random tokens"}
        == other["settings"]
    )
    assert other["realised_rate"] == 1 and other["compression_ratio"] == 0.5, (
        "two ids a concept, both counted"
    )
    assert json.loads((run / "benchmark.json").read_text()) == found, (
        "only the run folder itself keeps figures"
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ("RUN", "--prompt-tokens", "300"),
            "got 300 tokens .*need 1 to 255.*try: --prompt-tokens 255",
        ),
        (("RUN", "--dtype", "float8"), "need one of float32"),
        (("RUN", "--rate", "0.1"), "max_tail = 3"),
        (("RUN", "--data", "none.txt"), "none.txt"),
        (("BASE", "--new-tokens", "8"), "has no concepts to decode with"),
    ],
)
def test_bad_input_is_one_sentence(run, base_folder, words, said):
    known = {"RUN": run, "BASE": base_folder}
    message = sememe("benchmark", *(known.get(word, word) for word in words), code=1)
    assert re.search(said, message), message
    assert "try: " in message and "\n" not in message


def test_what_is_a_compressor(run, base_folder):
    assert is_compressor(run) and is_compressor(str(run / "model"))
    assert not is_compressor(base_folder) and not is_compressor("smollm2-135m")
