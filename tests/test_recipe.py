"""Recipes: every fault is one sentence with got, need, try."""

from pathlib import Path

import pytest
import yaml

from sememe.errors import RecipeError
from sememe.training.recipe import Schedule, Split, check_recipe, known_keys, load_recipe


@pytest.fixture
def path(tmp_path, recipe_values):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values))
    return file


def test_overrides_are_dotted_and_typed(path):
    recipe = load_recipe(path, ["rate=0.25", "split.middle=1", "split.deep=2", "boundary=fixed"])
    assert (recipe.rate, recipe.split.middle, recipe.split.deep, recipe.boundary) == (
        0.25,
        1,
        2,
        "fixed",
    )


def test_yaml_null_is_the_null_boundary(recipe_values):
    assert check_recipe({**recipe_values, "boundary": None}, "r").boundary == "null"


def test_saved_recipe_reads_back_equal(path):
    recipe = load_recipe(path)
    assert check_recipe(yaml.safe_load(recipe.yaml()), "saved") == recipe


@pytest.mark.parametrize("name", ["demo", "smollm2-135m-compressor", "smollm2-135m-planner"])
def test_what_is_shown_of_a_recipe_is_all_that_matters(name):
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / f"{name}.yaml")
    shown = yaml.safe_load(recipe.yaml(whole=False))
    assert check_recipe(shown, "shown") == recipe and ("plan" in shown) == name.endswith("planner")


@pytest.mark.parametrize(
    "override, said",
    [
        ("ratio=0.5", "unknown key 'ratio'.*try: "),
        ("split.midle=3", "unknown key 'split.midle'.*try: split.middle"),
        ("rate=1.5", "rate = 1.5: .*less than or equal to 1"),
        ("rate=0", "rate = 0: .*greater than 0"),
        ("rate=fast", "rate = 'fast'"),
        ("head=both", "head = 'both'"),
        ("steps=0", "steps = 0"),
        ("steps", "need key=value"),
        ("boundary=stride", "boundary = 'stride'"),
        ("distil=0.5 system=control", "distil = 0.5 is for system: online"),
        ("rate=0.1", "max_tail = 6 forces a concept more often"),
        ("schedule.quantise=[0.5,0.1]", r"schedule.quantise.*0 ≤ start ≤ end ≤ 1"),
        ("data.heldout=${data.train}", "held-out text is never"),
    ],
)
def test_bad_values_are_one_sentence(path, override, said):
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(path, override.split())
    assert "\n" not in str(caught.value) and "try: " in str(caught.value)


def test_missing_and_unreadable_files(path, tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe at .*try: .*recipe.yaml"):
        load_recipe(tmp_path / "recipy.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(RecipeError, match="cannot be read as a recipe"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match=r"holds no key|cannot be read"):
        load_recipe(tmp_path / "list.yaml")


def test_missing_key_is_named(recipe_values):
    recipe_values["data"].pop("heldout")
    with pytest.raises(RecipeError, match=r"key 'data.heldout' is missing"):
        check_recipe(recipe_values, "r")


@pytest.mark.parametrize(
    "given, want",
    [
        ({}, (4, 22, 4)),
        ({"shallow": 6}, (6, 20, 4)),
        ({"middle": 18, "deep": 8}, (4, 18, 8)),
        ({"middle": 18}, (4, 18, 8)),
        ({"shallow": 1, "middle": 2, "deep": 3}, (1, 2, 3)),
    ],
)
def test_split_is_filled_to_the_base(given, want):
    assert Split(**given).resolve(30) == want


def test_schedule_goes_from_states_to_codes():
    schedule = Schedule(quantise=(0.5, 0.8))
    assert [schedule.at(x) for x in (0.0, 0.5, 0.65, 1.0)] == [0, 0, pytest.approx(0.5), 1]
    assert Schedule(quantise=(0, 0)).at(0.0) == 1


def test_known_keys_name_what_other_tools_rely_on():
    assert {
        "system",
        "base",
        "data.train",
        "data.heldout",
        "steps",
        "sequence_length",
        "batch_size",
        "rate",
        "split.shallow",
        "split.middle",
        "split.deep",
        "max_tail",
        "head",
        "boundary",
        "num_concepts",
        "seed",
    } <= set(known_keys())
