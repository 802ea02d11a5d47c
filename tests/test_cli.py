"""The command line: help, the whole path on a tiny base, and one sentence for bad input."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from conftest import sememe, tiny_recipe
from sememe import cli
from sememe.models.loading import load_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_folder, texts):
    """A finished online run, its control, and a copy that names another place of its text."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(base_folder, texts) | {"steps": 6}))
    sememe("train", recipe, "--out", folder / "r", "--json", folder / "train.json")
    sememe("train", recipe, "system=control", "--out", folder / "r-control")
    shutil.copy(texts[0], folder / "copy.txt")
    moved = shutil.copytree(folder / "r", folder / "moved", symlinks=True) / "recipe.yaml"
    moved.write_text(moved.read_text().replace(str(texts[0]), "gone.txt"))
    (folder / "moved" / "manifest.json").unlink()  # as in runs of earlier releases
    return folder


def test_help_teaches_few_parameters_and_only_those_are_advised():
    command = typer.main.get_command(cli.app)
    assert all("Example:" in sememe(name, "--help") for name in command.commands)
    parameters = [p for c in command.commands.values() for p in c.params] + command.params
    # 70; what a server needs to be told (address, key, limits, times) 12; `benchmark` of servers
    # (which, how requests arrive, seed) and of batches 4; in how many processes it serves,
    # compresses and evaluates 3; that a run goes on although something has changed 1; where a
    # conversation is kept 1; what is planned for (GPUs, tokens, price, context), of which recipe 8;
    # what is tokenised, how and where to 6; that processes share the base 1.
    assert len(parameters) <= 106
    known = {option for parameter in parameters for option in parameter.opts} | {"--help"}
    for path in Path(cli.__file__).parent.rglob("*.py"):
        for option in re.findall(r"try: (--[a-z-]+)", path.read_text(encoding="utf-8")):
            assert option in known, f"{path}: {option}"


def test_help_and_report_start_without_torch():
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    program = f"import sys, sememe.cli, sememe.report; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", program]) == b"set()\n"


def test_train_writes_its_figures_and_is_not_repeated(runs):
    figures = json.loads((runs / "train.json").read_text())
    assert figures["step"] == 6 and figures["model"].endswith("model")
    assert "nothing to train" in sememe("train", runs / "tiny.yaml", "--out", runs / "r")


def test_evaluate_gives_the_contract(runs, texts):
    words = ("--data", texts[1], "--tokens", 512, "--json", runs / "e.json")
    printed = sememe("evaluate", runs / "r", *words, "--control", runs / "r-control")
    result = json.loads((runs / "e.json").read_text())
    keys = """tokens nll bits_per_byte concept_rate compression_ratio layer_share nll_in_tail
        nll_at_concepts longest_tail delta_nll_control delta_nll_zero delta_nll_shuffle
        delta_nll_random code_perplexity codes_used largest_code_share"""
    for key in keys.split():
        assert isinstance(result[key], int | float) and key in printed, key
    assert json.loads((runs / "r" / "evaluate.json").read_text()) == result
    rate = result["concept_rate"]
    assert result["tokens"] == 16 * 31 and rate == pytest.approx(1 / result["compression_ratio"])
    model, _ = load_model(runs / "r")
    sizes = {name: p.numel() for name, p in model.backbone.model.layers[1].named_parameters()}
    all_of_it = sum(size for name, size in sizes.items() if "proj" in name)
    seen = sum(size for name, size in sizes.items() if "k_proj" in name or "v_proj" in name)
    bridge = sum(p.numel() for p in model.bridge.parameters() if p.dim() == 2)
    bridge += model.bridge.shallow.weight.numel()  # on the way through the middle slice
    tail = 2 * seen + bridge
    assert result["layer_share"] == pytest.approx(
        (2 + 2 * rate + (1 - rate) * tail / all_of_it) / 4
    )
    sememe("evaluate", runs / "r-control", *words)
    alone = json.loads((runs / "e.json").read_text())
    assert alone["concept_rate"] is None and alone["layer_share"] == 1.0
    assert result["delta_nll_control"] == pytest.approx(result["nll"] - alone["nll"], abs=1e-5)


def test_generate_streams_and_marks_concepts(runs):
    words = ("--prompt", "the cat sat", "--max-new-tokens", 8, "--json", runs / "g.json")
    printed = sememe("generate", runs / "r", *words, "--show-concepts")
    result = json.loads((runs / "g.json").read_text())
    assert "⟨sink⟩" in printed and "the cat" not in result["text"]
    assert result["new_tokens"] <= 8 and len(result["concept_ids"]) >= 11
    for concept in result["concept_ids"]:
        name = f"⟨{concept // 32}·{concept % 32}⟩"
        assert concept < 0 or name in printed.replace("\n", "")
    plain = sememe("generate", runs / "r-control", *words, "--temperature", 0.8)
    assert plain.startswith("the cat") and "⟨" not in plain


def test_text_and_paths_are_printed_as_they_are(runs):
    prompt, odd = "ratio a:b:c [/b] then :key: and\ttab, 日本 🙂", runs / "r[v2]" / ":key:[" / "b]"
    shutil.copytree(runs / "r", odd)
    printed = sememe("generate", odd, "--prompt", prompt, "--max-new-tokens", 4, "--show-concepts")
    assert re.sub("⟨[^⟩]*⟩", "", printed).startswith(prompt)
    assert f"report: {odd / 'report.html'}\n" in sememe("report", odd)
    assert str(odd) in sememe("export", odd, "--out", odd / "merged")


def test_benchmark_gives_the_contract(runs):
    words = ("--prompt-tokens", 32, "--new-tokens", 8, "--repeats", 1, "--json", runs / "b.json")
    sememe("benchmark", runs / "r", *words)
    result = json.loads((runs / "b.json").read_text())
    for side in (result["concept"], result["base"]):
        speeds = [side[f"{part}_tokens_per_s"] for part in ("prefill", "decode", "train")]
        assert min(*speeds, side["cache_bytes"], side["weight_bytes"]) > 0
        for part in ("prefill", "train"):  # None where nobody can tell
            assert (side[f"{part}_peak_bytes"] or math.inf) >= side["weight_bytes"]
    speedups = [result[f"{part}_speedup"] for part in ("prefill", "decode", "ceiling_decode")]
    others = ("ragged_decode_speedup", "cache_reduction", "train_step_ratio")
    assert min(*speedups, *(result[key] for key in others)) > 0
    assert {"prefill_memory_ratio", "train_memory_ratio"} < result.keys()
    assert 0.4 < result["realised_rate"] < 0.65


def test_bits_per_byte_are_of_the_text(runs, tmp_path):
    # Three bytes, three tokens, and an eos without bytes between two texts.
    (tmp_path / "short.jsonl").write_text('{"text": "gö"}\n' * 300)
    words = ("--data", tmp_path / "short.jsonl", "--tokens", 320, "--json", tmp_path / "e.json")
    sememe("evaluate", runs / "r", *words)
    figures = json.loads((tmp_path / "e.json").read_text())
    stream = [1, 1, 1] + [0, 1, 1, 1] * 299
    num_bytes = sum(sum(stream[start + 1 : start + 32]) for start in range(0, 320, 32))
    bits = figures["nll"] * 310 / math.log(2)
    assert figures["tokens"] == 310 and figures["bits_per_byte"] == pytest.approx(bits / num_bytes)


@pytest.mark.parametrize(
    "command, message",
    [
        ("evaluate RUNS/r --data missing.txt", "missing.txt"),
        ("evaluate RUNS/r --data RUNS/copy.txt", "is what .* was trained on"),
        ("ablate RUNS/r --data RUNS/copy.txt#text", "is what .* was trained on"),
        ("evaluate RUNS/moved --data RUNS/copy.txt", "is what .* was trained on"),
        ("generate LONG --prompt cat", r"\(300 characters\)' is neither a known base"),
        ("generate RUNS/r --prompt caf\udce9", "the prompt has half of a character"),
        ("train LONG", "cannot be used as a path"),
        ("train RUNS/tiny.yaml --out LONG", "cannot be used as a path"),
        ("sweep RUNS/tiny.yaml --out LONG", "cannot be used as a path"),
        ("report LONG", "cannot be used as a path"),
        ("doctor LONG", "cannot be used as a path"),
        ("export RUNS/r --out LONG", "cannot be used as a path"),
        ("train RUNS/tiny.yaml sequence_length=300 --out RUNS/long", "300 tokens .*length=256"),
        ("benchmark RUNS/r --prompt-tokens 200", "200 tokens .* 64 .*--prompt-tokens 192"),
        ("evaluate RUNS/r --data HELD --control RUNS", "holds no model"),
        ("evaluate smollm2-135m-online", "got no --data"),
        ("generate RUNS/r --prompt '  '", "the prompt is empty"),
        ("generate RUNS/r --prompt cat --max-new-tokens 9999", "positions for 256"),
        ("generate RUNS/r --prompt cat --rate few", "need numbers with commas"),
        ("generate RUNS/r-control --prompt cat --show-concepts", "has no concepts"),
        ("reconstruct RUNS/r-control", "cannot write a text again"),
        ("benchmark RUNS/r --dtype float8", "need one of float32"),
        ("export RUNS/r --out RUNS", "ot empty"),
    ],
)
def test_bad_input_is_one_sentence(runs, texts, command, message):
    for word, path in {"RUNS": runs, "HELD": texts[1], "LONG": "x" * 300}.items():
        command = command.replace(word, str(path))
    printed = sememe(*shlex.split(command), code=1)
    assert re.search(message, printed) and "try: " in printed and "\n" not in printed, printed
    assert not (runs / "long").exists(), "nothing is begun"


def test_a_fault_ends_with_one_line_and_code_1(tmp_path):
    words = [sys.executable, "-m", "sememe", "train", "nowhere.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no recipe at nowhere.yaml")
