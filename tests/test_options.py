"""Options of a recipe: each is defined once, and every fault is one sentence."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from sememe import keys, options
from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.head import HEADS
from sememe.errors import RecipeError
from sememe.keys import Concepts, known_keys, split_layers
from sememe.models.planner.proposers import PROPOSERS
from sememe.options import check_recipe, load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path, recipe_values):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values))
    return file


def test_the_page_is_printed_from_the_options_and_names_are_those_that_there_are():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == options.page(), "run: python -m sememe.options > docs/options.md"
    # 64, and `base_bits`: frozen weights in 8 or 4 bits are no value of `precision`, which is what
    # they are computed in.
    assert len(known_keys()) <= 65 and all(f"| `{key}` |" in page for key in known_keys())
    assert set(PROPOSERS) == set(get_args(keys.Proposer))
    for key, known in (("head", HEADS), ("boundary", BOUNDARIES)):
        assert set(get_args(Concepts.model_fields[key].annotation)) == set(known), key


def test_overrides_are_dotted_and_typed(path):
    recipe = load_recipe(path, ["rate=0.25", "split=[1,1,2]", "boundary=null", "lora.rank=2"])
    assert (recipe.rate, recipe.split, recipe.boundary) == (0.25, (1, 1, 2), "null")
    assert recipe.lora.rank == 2 and recipe.lora.dropout == 0.1, "the rest of a group stays"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name
)
def test_recipes_are_valid_and_read_back_equal_whole_or_short(path):
    recipe = load_recipe(path)
    for whole in (True, False):
        assert check_recipe(yaml.safe_load(recipe.yaml(whole)), "saved") == recipe


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("ratio=0.5", "unknown key 'ratio'.*try: rate"),
        ("lora.rang=3", "unknown key 'lora.rang'.*try: lora.rank"),
        ("rate=0", "rate = 0: .*greater than 0"),
        ("head=both", "head = 'both': Input should be 'nearest' or 'joint'"),
        ("steps", "steps = None"),
        ("quantise=[0.5,0.1]", "quantise.*need start ≤ end"),
        ("num_concepts=65536 codes_per_concept=4", "need at most 48 bits"),
        ("data.fields=[a,a]", "need two fields of a row"),
        ("plan.sizes=[64]", "need one of each for every type"),
        ("plan.multi_token=9", "need at most 8"),
        ("em.proposers.guess=2", "'guess': Input should be 'beam'"),
    ],
)
def test_bad_values_are_one_sentence(path, override, match):
    with pytest.raises(RecipeError, match=match) as caught:
        load_recipe(path, override.split())
    assert "\n" not in str(caught.value) and "try: " in str(caught.value)


def test_what_is_no_recipe_is_one_sentence(path, recipe_values):
    for content in ("a: [1,", "- 1"):
        path.write_text(content)
        with pytest.raises(RecipeError, match=r"recipe\.yaml.*try: "):
            load_recipe(path)
    recipe_values["data"].pop("heldout")
    with pytest.raises(RecipeError, match=r"key 'data.heldout' is missing"):
        check_recipe(recipe_values, "r")


def test_split_is_filled_to_the_base():
    for split, want in ((None, (4, 22, 4)), ((6, None, 4), (6, 20, 4)), ((9, 13, 8), (9, 13, 8))):
        assert split_layers(split, 30) == want
    for split in ((1, 2, 3), (None, 28, 2), (1, None, None)):
        with pytest.raises(RecipeError, match=r"split .*30 in all.*try: split=\[1,null,1\]"):
            split_layers(split, 30)


def test_short_targets_come_first(recipe_values):
    values = {**recipe_values, "steps": 100, "target_length": 96}
    recipe = check_recipe({**values, "curriculum": [16, 0.5]}, "r")
    assert [recipe.target_tokens(step) for step in (0, 25, 50, 99)] == [16, 56, 96, 96]
    assert check_recipe(values, "r").target_tokens(0) == 96
