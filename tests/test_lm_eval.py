"""lm-eval, unmodified, over saved models: its figures are the model's own. Skipped where it is not
installed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from families import online_over, text
from sememe.models.loading import export_model, load_model

pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]'")

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "examples" / "tasks"


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """A base, a concept model over it, and the same merged: folders that the harness loads by
    itself."""
    root = tmp_path_factory.mktemp("lm-eval")
    model = online_over(
        base_folder, text(16, 24), bridge=True, anchor=True, codes_per_concept=2, head="nearest"
    )
    model.save_pretrained(root / "adapted")
    load_model(base_folder)[1].save_pretrained(root / "adapted")
    export_model(root / "adapted", root / "merged")
    return {"base": base_folder, "adapted": root / "adapted", "merged": root / "merged"}


@pytest.fixture
def tasks(tmp_path):
    """The example's tasks with passages short enough for a tiny base: 250 bytes of 256 places."""
    items = [json.loads(line) for line in (TASKS / "thursday.jsonl").read_text().splitlines()[:4]]
    items = [
        item | {"context": item["context"][:90], "choices": [c[:40] for c in item["choices"]]}
        for item in items
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    for path in TASKS.glob("*.yaml"):
        task = yaml.safe_load(path.read_text())
        task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "items.jsonl")}}
        (tmp_path / path.name).write_text(
            yaml.safe_dump(task | {"task": "tiny" + task["task"][8:]})
        )
    return tmp_path, items


@torch.no_grad()
def log_p(model, tokenizer, context: str, continuation: str) -> float:
    """Of the continuation, by one forward."""
    ids = [tokenizer.bos_token_id] if not context else []
    ids, new = ids + tokenizer(context).input_ids, tokenizer(continuation).input_ids
    log_p_TV = model(torch.tensor([ids + new])).logits[0].log_softmax(-1)
    return float(log_p_TV[len(ids) - 1 : -1].gather(1, torch.tensor(new)[:, None]).sum())


@pytest.mark.parametrize("kind", ["base", "adapted", "merged"])
def test_the_harness_finds_what_the_model_says(saved, tasks, kind, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, items = tasks
    model, tokenizer = load_model(saved[kind])
    logs = [
        [log_p(model, tokenizer, item["context"], " " + c) for c in item["choices"]]
        for item in items
    ]
    passages = [item["context"] + " " + item["choices"][item["answer"]] for item in items]
    total = sum(log_p(model, tokenizer, "", passage) for passage in passages)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for batch_size in (1, 3):  # the harness pads on the right, and passes no mask
        found = simple_evaluate(
            "hf",
            {"pretrained": str(saved[kind])},
            tasks=["tiny_next", "tiny_perplexity"],
            task_manager=manager,
            batch_size=batch_size,
            device="cpu",
            bootstrap_iters=0,
        )
        said = [
            [float(answer[0]) for answer in sample["filtered_resps"]]
            for sample in found["samples"]["tiny_next"]
        ]
        # Merged LoRA and padding change the order of sums: 1e-4 of about 200 nats at worst; a wrong
        # mask gives whole nats.
        torch.testing.assert_close(torch.tensor(said), torch.tensor(logs), atol=5e-3, rtol=0)
        right = [
            max(range(4), key=row.__getitem__) == item["answer"]
            for row, item in zip(logs, items, strict=True)
        ]
        assert found["results"]["tiny_next"]["acc,none"] == sum(right) / 4
        bits = -total / math.log(2) / sum(len(passage.encode()) for passage in passages)
        assert found["results"]["tiny_perplexity"]["bits_per_byte,none"] == pytest.approx(
            bits, abs=1e-4
        )


def test_the_example_runs(saved):
    command = [
        sys.executable,
        "examples/lm_eval.py",
        str(saved["base"]),
        str(saved["adapted"]),
        "--limit",
        "1",
    ]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("|thursday_next ") == ran.stdout.count("|thursday_perplexity|") == 2
