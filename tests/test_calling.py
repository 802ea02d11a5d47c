"""Calls between transformers and the models: the cache under every name, and what would be ignored
is refused."""

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, DynamicCache, Trainer, TrainingArguments

from families import left_padded, online_over, text, tiny_base, tiny_online, uncached_greedy
from sememe.backbone.calling import CACHE, CACHE_NAMES, cache_argument
from sememe.backbone.split import self_check
from sememe.errors import BaseError
from sememe.models import ControlConfig, ControlForCausalLM, OnlineForCausalLM
from sememe.options import check_recipe


def length(tokens: int) -> dict:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


GREEDY = length(8) | {"do_sample": False, "pad_token_id": 0}
FAMILIES = ["llama", "qwen3", "gemma3_text", "mistral"]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "returned": {"num_beams": 2, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def model():
    return tiny_online()


def control(**settings) -> ControlForCausalLM:
    base = tiny_base()
    return ControlForCausalLM(
        ControlConfig(text_config=base.config, base="tiny", lora_rank=4, **settings), base
    ).eval()


def generated(model, ids, **named):
    """`generate`, or None where transformers refuses a name. Its own warning of an old name is the
    caller's, not ours."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return model.generate(ids, **named)
        except ValueError as error:
            assert "not used by the model" in str(error), error
            return None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_generate_uses_a_cache_of_any_name_or_refuses_it(family, way):
    model, settings = tiny_online(family), GREEDY | WAYS[way]
    ids, mask = left_padded([text(1, n, seed=n) for n in (5, 9)])
    rows = 2 * settings.get("num_beams", 1)
    want = generated(model, ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(generated(model, ids, attention_mask=mask, **settings), want)
    used = []
    for name in CACHE_NAMES:
        cache = model.new_cache(rows)
        got = generated(model, ids, attention_mask=mask, **{name: cache}, **settings)
        if got is not None:
            assert torch.equal(got, want) and cache.get_seq_length() == 9 + 7, name
            used.append(name)
    assert {"cache", CACHE} <= set(used)


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_from_a_cache_of_any_name(family):
    model, ids = tiny_online(family), text(1, 9)
    want = uncached_greedy(model, ids, 8)
    for name in CACHE_NAMES:
        cache = model.new_cache(1)
        first = model.generate(ids, cache=cache, **GREEDY | length(3))
        named = {"attention_mask": torch.ones_like(first), name: cache}
        got = generated(model, first, **named, **GREEDY | length(5))
        assert got is None or torch.equal(got, want), name


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


@pytest.mark.parametrize(
    "named, said",
    [
        ({"past_states": IDS}, "got past_states, which it does not know"),
        ({"label": IDS}, "got label, .* try: labels=…"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "got cu_seq_lens_q"),
        (
            {"attention_mask": torch.ones(2, 8)},
            r"shape \(2, 8\): need \(2, past \+ 6\) with 0",
        ),
        ({"position_ids": torch.arange(3, 9)[None]}, "begin at more than 0 and there is no cache"),
        ({"position_ids": PACKED}, "start again within a row, as in packed texts"),
        ({"input_ids": IDS[:, :0]}, "no new token"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["online", "window"])
def test_what_would_be_ignored_is_refused_in_one_sentence(model, kind, named, said):
    if kind == "window" and "cu_seq" in said:
        pytest.skip("an argument of the base's own")
    with pytest.raises(ValueError, match=said) as refused:
        (model if kind == "online" else control(window=3))(**{"input_ids": IDS} | named)
    assert "try:" in str(refused.value) and "\n" not in str(refused.value)


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


def test_padding_on_either_side_is_no_packed_text(model):
    ids, mask = left_padded([text(1, n, seed=n) for n in (5, 9)])
    for side in (0, 1):
        ids, mask = (x.flip(1) if side else x for x in (ids, mask))
        position = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as `generate` numbers them
        model(ids, attention_mask=mask, position_ids=position)


class Forgetful(nn.Module):
    """A layer as those of 5.40: what is not called by its name is swallowed."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        return self.layer(
            hidden_states, **{k: v for k, v in kwargs.items() if k not in CACHE_NAMES}
        )


class Nameless(Forgetful):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs)


def test_the_self_check_decodes_and_notices_layers_that_forget_their_cache():
    base = tiny_base()
    assert self_check(base) < 1e-5
    for kind, said in ((Forgetful, "differs from the loop"), (Nameless, "names no cache")):
        base = tiny_base()
        base.model.layers[2] = kind(base.model.layers[2])
        with pytest.raises(BaseError, match=said):
            self_check(base)
    assert cache_argument(base, None) == {} and set(cache_argument(base, 1)) == {CACHE}


def test_users_read_no_announcement_of_a_library(recipe_values, tmp_path):
    """The commands in a process of their own, FutureWarnings as errors: transformers announces what
    it will take away."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(
        check_recipe(recipe_values | {"gradient_checkpointing": True, "steps": 2}, "test").yaml()
    )
    words = [
        ["train", recipe, "--out", run],
        ["generate", run, "--prompt", "the cat", "--max-new-tokens", "4"],
        ["benchmark", run, "--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1"],
        ["evaluate", run, "--tokens", "64"],
    ]
    program = "import json, sys; from sememe import cli; "
    program += "[cli.app(w, standalone_mode=False) for w in json.loads(sys.argv[1])]"
    python = [sys.executable, "-W", "error::FutureWarning", "-c", program]
    done = subprocess.run(
        [*python, json.dumps(words, default=str)],
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "deprecated" not in said.lower(), said


# ---- loading and saving ----


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    one = online_over(
        base_folder, torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(0))
    )
    folder = tmp_path_factory.mktemp("saved")
    one.save_pretrained(folder)
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


def test_the_trainer_resumes_without_a_word_about_weights_of_the_base(saved, tmp_path, caplog):
    one = OnlineForCausalLM.from_pretrained(saved)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 259, (8, 16))]
    for steps in (2, 3):
        options = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(one, options, train_dataset=rows)
        with caplog.at_level(logging.WARNING, "transformers"):
            logging.getLogger("transformers").propagate = True
            trainer.train(resume_from_checkpoint=steps == 3)
            logging.getLogger("transformers").propagate = False
    assert trainer.state.global_step == 3 and "missing keys" not in caplog.text
