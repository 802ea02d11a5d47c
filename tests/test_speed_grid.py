"""The grid of speeds in examples/: every point beside the base, nothing timed twice, llama.cpp."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from families import tiny_base

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
speed_grid = importlib.import_module("speed_grid")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_untrained_model_leaves_the_base_as_it_is(family):
    base = tiny_base(family)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = speed_grid.untrained(base, "1/2/1", 0.25)
        cache = model.new_cache(2)
        model(ids, cache=cache, use_cache=True)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert list(cache.concepts) == [10, 10], "one concept in four tokens"


def test_points_are_written_as_they_come_and_not_timed_again(
    base_folder, tmp_path, monkeypatch, capsys
):
    class Llama:
        def __init__(self, **options):
            assert options["n_ctx"] == 22

        def reset(self):
            pass

        def generate(self, ids, temp):
            return iter(ids * 2)

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    out = tmp_path / "grid.json"
    words = f"{base_folder} --prompt-lengths 16 --batches 1 2 --rates 0.5 --new-tokens 6"
    words += f" --repeats 1 --splits 1/2/1 2/2/2 --gguf x.gguf --out {out}"
    options = speed_grid.parser.parse_args(words.split())
    results = speed_grid.main(options)
    assert json.loads(out.read_text()) == results and len(results) == 5
    points = [point for name, point in results.items() if "1/2/1" in name]
    assert [point["realised_rate"] for point in points] == pytest.approx([0.5, 0.5], abs=0.07)
    assert all("need" in point["fault"] for name, point in results.items() if "2/2/2" in name)
    printed = capsys.readouterr().out
    assert "decode_speedup" in printed and "llama.cpp, prompt 16" in printed
    again = speed_grid.main(options)
    assert {name: again[name] for name in again if "2/2/2" not in name} == {
        name: results[name] for name in results if "2/2/2" not in name
    }
