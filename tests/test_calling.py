"""Calls between transformers and the models: the cache under every name, and what would be ignored
is refused."""

import subprocess
import sys

import pytest
import torch
from transformers import BitsAndBytesConfig, DynamicCache

from families import online_over, refused, text, tiny_base, tiny_online
from sememe.backbone.calling import CACHE, CACHE_NAMES
from sememe.models import ControlConfig, ControlForCausalLM, OnlineForCausalLM

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_online()


def control(**settings) -> ControlForCausalLM:
    base = tiny_base()
    config = ControlConfig(text_config=base.config, base="tiny", lora_rank=4, **settings)
    return ControlForCausalLM(config, base).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", ["online", "control", "window"])
def test_forward_uses_a_cache_of_any_name(model, kind, name):
    if kind != "online":
        model = control(window=3 if kind == "window" else None)
    ids = text(2, 12)
    cache = model.new_cache(2) if kind == "online" else DynamicCache()
    named = {"use_cache": True, name: cache}
    parts = [model(ids[:, a:b], **named) for a, b in ((0, 7), (7, 8), (8, 12))]
    logits = torch.cat([out.logits for out in parts], 1)
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert parts[0][CACHE] is cache and cache.get_seq_length() == 12


IDS = text(2, 6)
PACKED = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
IGNORED = [
    ({"past_states": IDS}, "got past_states, which it does not know"),
    ({"label": IDS}, "got label, .* try: labels=…"),
    ({"attention_mask": torch.ones(2, 8)}, r"shape \(2, 8\): need \(2, past \+ 6\) with 0"),
    ({"position_ids": torch.arange(3, 9)[None]}, "begin at more than 0 and there is no cache"),
    ({"position_ids": PACKED}, "start again within a row, as in packed texts"),
    ({"input_ids": IDS[:, :0]}, "no new token"),
]
UNFIT = [
    ({"cu_seq_lens_q": torch.tensor([0, 6])}, "got cu_seq_lens_q"),
    ({"input_ids": None}, "either input_ids or inputs_embeds"),
    ({"inputs_embeds": torch.zeros(2, 6, 64)}, "either input_ids or inputs_embeds"),
    ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"has shape \(2, 1, 6, 6\)"),
    ({"cache": DynamicCache()}, "is a DynamicCache .*need this model's own"),
    ({"output_attentions": True}, "no .* table of weights"),
    ({"output_hidden_states": True}, "hidden"),
]


@pytest.mark.parametrize(
    "kind, named, said",
    [("online", *case) for case in IGNORED + UNFIT] + [("window", *case) for case in IGNORED],
    ids=str,
)
def test_what_would_be_ignored_is_refused_in_one_sentence(model, kind, named, said):
    model = model if kind == "online" else control(window=3)
    refused(lambda: model(**{"input_ids": IDS} | named), said)


def test_caches_that_do_not_fit_are_refused(model):
    one, other = model.new_cache(2), model.new_cache(2)
    with pytest.raises(ValueError, match="two caches under the names"):
        model(IDS, cache=one, past_key_values=other)
    assert model(IDS, cache=one, past_key_values=one)[CACHE].get_seq_length() == 6
    used = model.new_cache(1)
    model.generate(text(1, 9), cache=used, **GREEDY)
    with pytest.raises(ValueError, match=r"no new token \(16 are in the cache\).* a new cache"):
        model(text(1, 9)[:, 9:], cache=used)
    with pytest.raises(ValueError):
        model.generate(text(1, 4), cache=used, **GREEDY)


# ---- loading and saving ----


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    online_over(base_folder, text(16, 24)).save_pretrained(folder)
    return folder


def test_importing_the_package_is_all_that_the_auto_classes_need(saved):
    program = (
        "import sys, sememe; print('torch' in sys.modules); "
        "from transformers import AutoModelForCausalLM as Auto; "
        "print(type(Auto.from_pretrained(sys.argv[1])).__name__)"
    )
    python = [sys.executable, "-c", program, str(saved)]
    done = subprocess.run(python, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "OnlineForCausalLM"]


@pytest.mark.parametrize(
    "named, near",
    [
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "leave it out|try: "),
        ({"ratee": 0.25}, "rate=…"),
        ({"bse": "elsewhere"}, "base=…"),
        ({"tp_plan": "auto"}, "try: "),
        ({"pol": False}, "pool=…"),
    ],
    ids=str,
)
def test_options_of_loading_that_would_vanish_are_refused(saved, named, near):
    with pytest.raises(ValueError, match=f"from_pretrained got {next(iter(named))}, .*{near}"):
        OnlineForCausalLM.from_pretrained(saved, **named)


def test_options_that_ask_for_nothing_are_taken_and_saving_ignores_none(saved, tmp_path):
    nothing = {"revision": "main", "subfolder": "", "variant": None, "quantization_config": None}
    one = OnlineForCausalLM.from_pretrained(saved, rate=0.25, local_files_only=True, **nothing)
    assert one.dial.rate == 0.25
    with pytest.raises(ValueError, match="save_pretrained got push_to_hub"):
        one.save_pretrained(tmp_path / "m", push_to_hub=True)
    assert not (tmp_path / "m").exists()
    one.save_pretrained(tmp_path / "m", push_to_hub=False, max_shard_size="1GB")
