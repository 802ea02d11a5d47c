"""lm-eval, unmodified, over saved models: its figures are the model's own. Skipped where it is not
installed."""

import json
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
    """A base, a concept model over it, and the same merged: the harness loads them by itself."""
    root = tmp_path_factory.mktemp("lm-eval")
    online_over(base_folder, text(16, 24), bridge=True, anchor=True).save_pretrained(root / "own")
    load_model(base_folder)[1].save_pretrained(root / "own")
    export_model(root / "own", root / "merged")
    return {"base": base_folder, "own": root / "own", "merged": root / "merged"}


@torch.no_grad()
def log_p(model, tokenizer, context: str, continuation: str) -> float:
    """Of the continuation, by one forward."""
    ids, new = tokenizer(context).input_ids, tokenizer(continuation).input_ids
    log_p_TV = model(torch.tensor([ids + new])).logits[0].log_softmax(-1)
    return float(log_p_TV[len(ids) - 1 : -1].gather(1, torch.tensor(new)[:, None]).sum())


@pytest.mark.parametrize("kind", ["base", "own", "merged"])
def test_the_harness_measures_what_the_model_says(saved, tmp_path, kind, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The example's task with passages short enough for a tiny base: 250 bytes of 256 positions.
    items = [json.loads(line) for line in (TASKS / "thursday.jsonl").read_text().splitlines()[:4]]
    for item in items:
        item["context"], item["choices"] = item["context"][:90], [c[:40] for c in item["choices"]]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = yaml.safe_load((TASKS / "thursday_next.yaml").read_text()) | {"task": "tiny_next"}
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "items.jsonl")}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task))
    model, tokenizer = load_model(saved[kind])
    want = [
        [log_p(model, tokenizer, item["context"], f" {c}") for c in item["choices"]]
        for item in items
    ]
    for batch_size in (1, 3):  # the harness pads on the right, and passes no mask
        results = simple_evaluate(
            "hf",
            {"pretrained": str(saved[kind])},
            tasks=["tiny_next"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            batch_size=batch_size,
            device="cpu",
            bootstrap_iters=0,
        )
        samples = results["samples"]["tiny_next"]
        own = [[float(x[0]) for x in sample["filtered_resps"]] for sample in samples]
        # Merged LoRA and padding change the order of sums: 1e-4 of about 200 nats at worst; a wrong
        # mask gives whole nats.
        torch.testing.assert_close(torch.tensor(own), torch.tensor(want), atol=5e-3, rtol=0)


def test_the_example_runs(saved):
    command = [sys.executable, "examples/lm_eval.py", str(saved["base"]), str(saved["own"])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [*command, "--limit", "1"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("|thursday_next ") == ran.stdout.count("|thursday_perplexity|") == 2
