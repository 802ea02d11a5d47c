"""The literal recipes, by the examples that run them on a Qwen base, here a tiny one."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import metrics, run
from sememe.concepts.plan import PlanShape
from sememe.models.planner.first_plans import random_plans
from sememe.options import check_recipe
from sememe.systems import SYSTEMS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["train_qwen", "train_qwen_2", "train_qwen_3"])
def test_an_example_trains_and_prints_its_figures(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    words = f"{name} --tiny steps=4 heldout_tokens=128 --out {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", words.split())
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    said = dict(line.rsplit(maxsplit=1) for line in lines if line[-1:].isdigit())
    figures = {key.strip(): value for key, value in said.items()}
    assert 4 < float(figures["nll"]) < 7, "near log 512, which is knowing nothing"
    assert float(figures["delta_nll_shuffle"]) < 1
    assert len(metrics(tmp_path / "run")) == 4


def test_codes_that_are_not_fitted_stay_as_they_are_drawn(recipe_values, tmp_path):
    values = recipe_values | {"quantise": [0, 0], "steps": 1, "concept_learning_rate": 1e-9}
    recipe = check_recipe(values, "test")
    drawn = SYSTEMS[recipe.system].build(recipe, Path(recipe.base)).writer.codes.weight
    for fitted in (True, False):
        run(values | {"fitted_codes": fitted}, tmp_path / str(fitted))
        weights = load_file(tmp_path / str(fitted) / "model" / "model.safetensors")
        codes = weights["writer.codes.weight"].float()  # saved in bf16
        assert torch.allclose(codes, drawn, rtol=1e-2, atol=1e-2) != fitted


def test_random_plans_are_full_and_use_every_id():
    plan_NP = random_plans(shape := PlanShape((3, 5), (1, 2)), 300)
    assert torch.equal(shape.check(plan_NP), plan_NP) and (shape.counts(plan_NP) > 0).all()
    for count_K in shape.id_counts(plan_NP):
        share_K = count_K / count_K.sum()  # four deviations of the rarest
        assert share_K.tolist() == pytest.approx([1 / len(share_K)] * len(share_K), abs=0.09)
