"""Held-out text of several sources: their shares, a figure of each, and whatever else reads
`data.heldout`."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from conftest import byte_tokenizer, ctrl_c, metrics, run, sememe
from sememe.data import heldout_blocks
from sememe.errors import DataError, Interrupted, RecipeError
from sememe.evaluation.inputs import run_recipe
from sememe.evaluation.serving import text_of
from sememe.evaluation.subject import Options, Subject
from sememe.options import check_recipe, load_recipe
from sememe.report import write_report
from sememe.shards import tokenize
from sememe.sweep import parse_grid, plan
from sememe.systems import SYSTEMS

OTHER = "WHO WOULD EXPECT THEM? In capitals, other words than the patterned ones!"


@pytest.fixture
def names(texts, tmp_path) -> list[str]:
    """A long text, and one of two rows of 32 bytes."""
    (tmp_path / "other.txt").write_text(OTHER)
    return [str(texts[1]), str(tmp_path / "other.txt")]


@pytest.fixture
def values(recipe_values, names):
    """Three rows of the first text in `heldout_tokens`, and all of the second."""
    recipe_values["data"]["heldout"] = names
    return recipe_values | {"heldout_tokens": 192}


@pytest.fixture
def trained(values, tmp_path) -> Path:
    run(values, tmp_path / "r")
    return tmp_path / "r"


def test_sources_have_equal_shares_and_a_row_at_least(names, tmp_path):
    tokenizer = byte_tokenizer()
    alone = [heldout_blocks(name, tokenizer, 16, 64) for name in names]
    blocks = heldout_blocks(names, tokenizer, 16, 128)
    assert blocks.counts == dict(zip(names, (4, 4), strict=True)) and blocks.text is None
    assert torch.equal(blocks.ids_NT, torch.cat([x.ids_NT for x in alone]))
    assert torch.equal(blocks.bytes_NT, torch.cat([x.bytes_NT for x in alone]))
    assert alone[0].counts is None and alone[0].text
    assert [*heldout_blocks(names, tokenizer, 16, 8).counts.values()] == [1, 1]
    assert len(heldout_blocks([names[0]] * 2, tokenizer, 16, 64)) == 4, "one text"
    lines = [json.dumps({"text": "a b c " * n}) for n in range(1, 9)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    tokenize([str(tmp_path / "d.jsonl")], tokenizer, tmp_path / "d", documents=True)
    mixed = heldout_blocks([names[0], str(tmp_path / "d")], tokenizer, 16, 64)
    assert mixed.counted_NT[:2].all() and not mixed.counted_NT[2:].all()


def test_a_run_logs_a_figure_of_each_source_and_the_mean_over_the_tokens_of_all(
    values, names, tmp_path
):
    """1e-6 is float32 in another order of sums; the two texts are 6e-3 apart."""
    measured = [line for line in run(values, tmp_path / "r") if "heldout_nll" in line]
    values["data"]["heldout"] = names[0]
    alone = run(values | {"heldout_tokens": 96}, tmp_path / "alone")
    alone = [line for line in alone if "heldout_nll" in line]
    assert len(measured) == len(alone) == 2
    for line, one in zip(measured, alone, strict=True):
        first, second = (line["heldout_nll_by_source"].pop(name) for name in names)
        assert line["heldout_nll_by_source"] == {} and abs(first - second) > 1e-3
        assert line["heldout_nll"] == pytest.approx((3 * first + 2 * second) / 5, abs=1e-6)
        assert one["heldout_nll"] == pytest.approx(first, abs=1e-6)
        assert "heldout_nll_by_source" not in one


def test_it_resumes_and_is_told_by_the_content_and_the_order_of_its_texts(values, names, tmp_path):
    whole = run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, tmp_path / "r")
    resumed = run(values, tmp_path / "r")
    assert [x.get("heldout_nll") for x in resumed] == [x.get("heldout_nll") for x in whole]
    values["data"]["heldout"] = names[::-1]
    with pytest.raises(RecipeError, match=r"with data\.heldout = "):
        run(values, tmp_path / "r")
    values["data"]["heldout"] = names
    Path(names[1]).write_text(OTHER * 2)
    with pytest.raises(RecipeError, match=r"data\.heldout = .*, not what it holds now"):
        run(values | {"steps": 9}, tmp_path / "r")


def test_none_of_them_is_trained_on(values, names, tmp_path):
    copy = shutil.copy(values["data"]["train"], tmp_path / "copy.txt")
    values["data"]["heldout"] = [names[0], str(copy)]
    with pytest.raises(DataError, match="holds the same bytes"):
        run(values, tmp_path / "r")


def test_what_a_recipe_may_name(values, tmp_path, names):
    path = tmp_path / "recipe.yaml"
    path.write_text(check_recipe(values, "r").yaml())
    assert load_recipe(path, ["data.heldout=[a.txt,b.txt]"]).data.heldout == ["a.txt", "b.txt"]
    with pytest.raises(RecipeError, match="need a text, or several"):
        load_recipe(path, ["data.heldout=[]"])
    pairs = load_recipe(path, ["system=planner", "steps=2"])
    with pytest.raises(RecipeError, match=r"cannot have pairs of several texts: .*try: "):
        SYSTEMS["planner"].check(pairs, 1)
    grid = parse_grid([f"data.heldout=[{','.join(names)}],{names[1]}"])
    points = plan(path, grid, [*grid], control=False)
    assert [entry["data"] for entry, _ in points] == names, "a sweep measures the first"
    assert "parameters" in sememe("plan", path)


def test_commands_take_the_held_out_texts_of_a_run(trained, names):
    sememe("evaluate", trained, "--tokens", 64)
    figures = json.loads((trained / "evaluate.json").read_text())
    assert figures["data"] == names[0]
    assert [x["data"] for x in figures["by_data"]] == names
    assert figures["nll"] == figures["by_data"][0]["nll"] != figures["by_data"][1]["nll"]
    sememe("ablate", trained, "--tokens", 64)
    assert json.loads((trained / "ablate.json").read_text())["data"] == names[0]
    first, second = Subject.load(str(trained), Options()).prompts(None, 16, 2)["input_ids"]
    for row, name in ((first, names[0]), (second, names[1])):
        beginning = byte_tokenizer()(Path(name).read_text()[:16])["input_ids"]
        assert row.tolist() == beginning
    assert text_of([str(trained)], None) == "\n\n".join(Path(x).read_text() for x in names)
    images = re.findall(r"base64,([^\"]+)", write_report(trained).read_text())
    drawn = b"".join(map(base64.b64decode, images))
    assert b"heldout.txt" in drawn and b"other.txt" in drawn


@pytest.mark.parametrize("several", [True, False])
def test_what_is_no_text_in_the_recipe_of_a_run_is_one_sentence(values, names, tmp_path, several):
    folder = tmp_path / "r"
    values["data"]["heldout"] = names if several else names[0]
    run(values, folder)
    (folder / "manifest.json").unlink()
    for heldout in (5, None, [5], {"a": 1}):
        values["data"]["heldout"] = heldout
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        assert re.search(r"need .* try: |should be .* try: ", sememe("evaluate", folder, code=1))


def test_a_moved_run_finds_them(values, names, tmp_path, monkeypatch):
    old = tmp_path / "old"
    old.mkdir()
    sources = [values["data"]["train"], *names]
    train, *heldout = [Path(shutil.copy(source, old)).name for source in sources]
    values["data"] |= {"train": train, "heldout": heldout}
    monkeypatch.chdir(old)
    run(values, Path("r"))
    old.rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new" / "r")
    found = run_recipe(tmp_path / "new" / "r")["data"]["heldout"]
    assert found == [str(tmp_path / "new" / name) for name in heldout]
    assert metrics(tmp_path / "new" / "r")[-1]["heldout_nll_by_source"].keys() == {*heldout}
