"""Training planners: a task that a plan solves, resume = uninterrupted with the plans on disk,
stages, the control's pairs."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ctrl_c, launch, metrics, run, sememe
from plan_runs import planner_recipe, write_pairs
from sememe.backbone.bases import load_tokenizer, resolve
from sememe.concepts.plan import PlanShape
from sememe.errors import DataError, Interrupted, RecipeError
from sememe.evaluation.plans import target_nll
from sememe.models.loading import load_model
from sememe.models.planner import PlannerOutput
from sememe.options import check_recipe
from sememe.pairs import IGNORED
from sememe.systems import SYSTEMS
from sememe.training import plans
from sememe.training.checkpoints import last_checkpoint
from sememe.training.plans import PLANS
from sememe.training.trainer import ConceptTrainer


@pytest.fixture
def values(base_folder, tmp_path) -> dict:
    return planner_recipe(base_folder, write_pairs(tmp_path))


def pairs_of(values: dict):
    recipe = check_recipe(values, "test")
    folder, system = resolve(recipe.base), SYSTEMS[recipe.system]
    return system.batches(recipe, load_tokenizer(folder), folder, lambda line: None).examples


def test_resume_is_uninterrupted_and_so_are_the_plans(values, tmp_path):
    """With dropout, sampling and an E-step on either side of the stop."""
    values["plan"] |= {"straight_through": True, "multi_token": 2, "signals": 0.5}
    values["plan"] |= {"sizes": [2, 6], "begins": "words", "dropout": 0.3}
    file = Path(values["data"]["train"])
    content = file.read_text().replace("the cat sat on a mat", "a cat sat")  # words in common
    file.write_text(content.replace("dogs dig", "the dog sat").replace("we sail at", "a dog ran"))
    whole = run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted, match="stopped at step 5 of 8"):
        run(values, tmp_path / "parts")
    parts = run(values, tmp_path / "parts")
    for key in ("loss", "signal_nll", "plan_nll", "em_score", "em_flips", "heldout_nll", "tokens"):
        assert [x.get(key) for x in parts] == [x.get(key) for x in whole], key
    assert sum("em_score" in x for x in whole) == 2, "at steps 4 and 6"
    a, b = (load_file(tmp_path / x / "model" / "model.safetensors") for x in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    last = [tmp_path / name / "checkpoints" / "checkpoint-8" for name in ("whole", "parts")]
    z = [load_file(folder / PLANS)["plans"] for folder in last]
    assert torch.equal(*z) and z[0].dtype == torch.int32 and len(z[0]) == 20
    (last[1] / PLANS).write_bytes((last[1] / PLANS).read_bytes()[:-1] + b"\x63")
    assert last_checkpoint(last[1].parent).name != last[1].name, "under its seal"


def test_stages_and_when_plans_are_searched_for(values, tmp_path, monkeypatch):
    """In the warm-up the planner stands still; then it learns; then E-steps, over the pairs that
    come next."""
    seen, weights, real = [], [], plans.HardEM.on_step_begin

    def fake(model, pairs, plan_NP, index_n, em, seed, tick, shared):
        seen.append((index_n.tolist(), seed))
        return {"em_flips": 0.0}

    def spy(self, args, state, control, model=None, **kwargs):
        real(self, args, state, control, model=model, **kwargs)
        now = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        weights.append((model.dial.plan_weight, now))

    monkeypatch.setattr(plans, "e_step", fake)
    monkeypatch.setattr(plans.HardEM, "on_step_begin", spy)
    values["em"]["examples"] = 3
    run(values, tmp_path / "r")
    order = pairs_of(values).order_n.tolist()
    next_pairs = [list(dict.fromkeys(order[start : start + 8]))[:3] for start in (16, 24)]
    assert [x[0] for x in seen] == next_pairs and seen[0][1] != seen[1][1]
    assert [x for x, _ in weights] == [0.0, 0.0, *[1.0] * 6]
    before, warm, later = (weights[step][1] for step in (0, 2, 4))
    planner, executor = ([n for n in before if part in n] for part in (".planner.", ".executor."))
    assert planner and all(torch.equal(before[n], warm[n]) for n in planner)
    assert not any(torch.equal(warm[n], later[n]) for n in planner if "lora_B" in n)
    assert not all(torch.equal(before[n], warm[n]) for n in executor)
    assert load_model(tmp_path / "r")[0].config.plan_weight == 1.0


def test_the_control_trains_on_the_same_pairs_with_the_source(values, tmp_path, monkeypatch):
    seen, real = {"planner": [], "control": []}, ConceptTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        names, system, rows = ("input_ids", "attention_mask", "labels"), self.run.recipe.system, []
        for ids, mask, labels in zip(*map(inputs.get, names), strict=True):
            y, u = labels[labels != IGNORED].tolist(), ids[mask.bool()].tolist()
            if system == "control":
                assert u[0] == 1 and u[len(u) - len(y) :] == y, "BOS, u, y; the loss on y alone"
                u = u[1 : len(u) - len(y)]
            rows.append((u, y))
        seen[system].append(rows)
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ConceptTrainer, "compute_loss", spy)
    values["curriculum"] = [4, 0.5]
    planner, control = (run(values | {"system": x}, tmp_path / x) for x in seen)
    assert seen["planner"] == seen["control"] and len(seen["control"]) == 8
    longest = [max(len(y) for _, y in rows) for rows in seen["planner"]]
    assert longest[:3] == [4, 9, 14], "short texts first"
    assert [x["tokens"] for x in planner] == [x["tokens"] for x in control]
    assert control[0]["tokens"] == sum(len(u) + len(y) for u, y in seen["control"][0])
    assert "heldout_nll" in control[-1] and "plan_nll" not in control[-1]


def test_the_controls_nll_is_the_loss_of_the_target_alone(values, tmp_path):
    """Rows of a batch, padded, against each row by hand, with its source before it."""
    run({**values, "system": "control", "steps": 2}, tmp_path / "c")
    model, pairs = load_model(tmp_path / "c")[0], pairs_of(values).pairs.rows(slice(0, 3))
    nll_NY = target_nll(model, pairs)
    for n in range(3):
        u = pairs.source_NU[n][pairs.source_mask_NU[n].bool()].tolist()
        y = [x for x in pairs.target_NY[n].tolist() if x != IGNORED]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([[1, *u, *y]])).logits[0].log_softmax(-1)
        want = [-float(log_p[len(u) + j, token]) for j, token in enumerate(y)]
        assert nll_NY[n, : len(y)].tolist() == pytest.approx(want, abs=1e-4)
        assert nll_NY[n, len(y) :].isnan().all()


def test_gradient_accumulation_is_one_batch(values, tmp_path):
    """Every target token counts once, the first of each too, and every concept."""
    values |= {"lora": {"rank": 4}}
    whole, parts = (run({**values, "gradient_accumulation": n}, tmp_path / str(n)) for n in (1, 2))
    assert [x["loss"] for x in parts] == pytest.approx([x["loss"] for x in whole], abs=1e-5)
    assert whole[0]["loss"] == pytest.approx(whole[0]["target_nll"], abs=1e-5)


def test_two_processes_train_as_one(values, tmp_path):
    """torchrun with 2 ranks that share E-steps of three batches of pairs: the losses, figures and
    plans of one process; and what resumes from the first checkpoint, with the base sharded, ends as
    it did."""
    values |= {"lora": {"rank": 4}}
    values["em"]["batch"] = 3
    one, two = run(values, tmp_path / "one"), []
    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-8"
    for options in ([], ["--sharded"]):
        process = launch(values, tmp_path / "two", 2, *options)
        said = process.communicate(timeout=240)[0]
        assert process.returncode == 0, said[-3000:]
        weights = load_file(tmp_path / "two" / "model" / "model.safetensors")
        two.append((metrics(tmp_path / "two"), load_file(checkpoint / PLANS), weights))
        shutil.rmtree(tmp_path / "two" / "model")
        shutil.rmtree(checkpoint)
    (lines, z, weights), (_, resumed_z, resumed_weights) = two
    assert "resuming from step 4" in said
    # Sums of two halves are rounded otherwise than those of the whole: 1e-6 of losses.
    for key in ("loss", "target_nll", "plan_nll", "plan_match", "em_score", "em_flips", "tokens"):
        figures = ([line[key] for line in x if key in line] for x in (lines, one))
        assert next(figures) == pytest.approx(next(figures), abs=1e-4), key
    assert sum("em_flips" in line for line in lines) == 2
    last = tmp_path / "one" / "checkpoints" / checkpoint.name / PLANS
    assert torch.equal(z["plans"], load_file(last)["plans"])
    assert torch.equal(z["plans"], resumed_z["plans"])
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_plain_text_and_bf16_train(base_folder, texts, tmp_path):
    values = planner_recipe(base_folder, texts) | {"precision": "bf16", "steps": 4}
    values["data"] = {"train": str(texts[0]), "heldout": str(texts[1]), "source_share": 0.25}
    lines = run(values, tmp_path / "r")
    assert any("em_score" in x for x in lines)
    assert metrics(tmp_path / "r")[-1]["heldout_nll_empty"] > 0


def test_runs_that_cannot_be_started_are_one_sentence(values, tmp_path):
    def rows(name: str, *pairs: tuple[str, str]) -> dict:
        file = tmp_path / f"{name}.jsonl"
        lines = (json.dumps({"instruction": u, "response": y}) + "\n" for u, y in pairs)
        file.write_text("".join(lines))
        return {"train": str(file)}

    fields = {"fields": ["prompt", "response"]}
    same = rows("same", *((f"say {n}", "the same") for n in range(8)))
    words = {"plan": values["plan"] | {"begins": "words"}}
    long, longer = rows("long", ("x" * 200, "y" * 100)), rows("longer", ("x", "y" * 255))
    both = {"source_length": 200, "target_length": 100, "system": "control"}
    no_room = r"got 200 tokens of text and 100 beside them, .* positions for 255.*source_length=155"
    for error, match, data, changes in (
        (RecipeError, "system = online cannot have pairs of data", {}, {"system": "online"}),
        (RecipeError, "system = planner cannot have distil", {}, {"distil": 0.5}),
        (DataError, "line 1 has no field 'prompt'", fields, {}),
        (DataError, "all get the same plan", same, {}),
        (DataError, "need more words", same, words),
        (DataError, no_room, long, both),
        (DataError, "255 tokens of text .*try: target_length=", longer, {"target_length": 255}),
    ):
        with pytest.raises(error, match=match) as caught:
            run(values | {"data": values["data"] | data} | changes, tmp_path / "r")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists(), "nothing is written for a run that cannot start"


def test_a_sweep_compares_planners_with_their_control(values, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "s"
    recipe.write_text(check_recipe(values, "test").yaml())
    sememe("sweep", recipe, "em.every=0,2", "--control", "--out", out, "--tokens", 64)
    control, *planners = json.loads((out / "sweep.json").read_text())["runs"]
    names = ["control", "planner_em.every-0", "planner_em.every-2"]
    assert [entry["name"] for entry in (control, *planners)] == names
    for entry in planners:
        assert entry["trained_tokens"] == control["trained_tokens"]
        figures, nll = entry["figures"], control["figures"]["nll"]
        assert figures["delta_nll_control"] == pytest.approx(figures["nll"] - nll, abs=1e-5)


def test_the_meter_counts_first_and_divides_once():
    """Two batches in one interval, all ids of a type alike to the planner; a type that ends early
    asks for its `<EOS>`, and for nothing after it."""
    meter = plans.PlanMeter(shape := PlanShape((3, 5), (1, 2)))
    for plan_BP in (shape.pack([[[0], [4]], [[2], [1, 3]]]), shape.pack([[[0], []]])):
        logits = torch.zeros(len(plan_BP), 3, 6)
        logits[:, 0, 3:5] = -torch.inf  # type 0 has three ids
        losses = {"target_nll": torch.tensor(1.0), "plan_nll": torch.tensor(2.0)}
        out = PlannerOutput(plan_logits=logits, plan_ids=plan_BP, **losses)
        meter.see(out, torch.zeros(len(plan_BP), 4, dtype=torch.long))
    figures = meter.read()
    for name, want in {
        "plan_entropy_by_slot": [math.log(4), math.log(6), math.log(6)],
        "plan_max_prob_by_slot": [1 / 4, 1 / 6, 1 / 6],
        "plan_match": 2 / 8,  # the first id is the first choice: type 0 of two plans
        "target_nll": 1,
        "plan_nll": 2,
        "plan_ids_used": [2, 3],
        "plan_largest_share": [2 / 3, 1 / 3],
        "plan_perplexity": [3 / 2 ** (2 / 3), 3.0],
    }.items():
        assert figures[name] == pytest.approx(want), name
    assert meter.read() == {}, "an interval is read once"
