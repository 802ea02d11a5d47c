"""A conversation's cache in a file: another process goes on as this one would have, and a file that
is not whole, of another model or made to harm is refused in one sentence."""

import json
import random
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer, sememe
from families import left_padded, online_over, text, tiny_online
from sememe.backbone import saved
from sememe.errors import CheckpointError, SememeError

LONG = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 40}
VARIANTS = [
    {},
    {"segment": "none", "bridge": True, "pool": True, "anchor": True},
    {"segment": "deep", "family": "gemma3_text"},
    {"segment": "both", "bridge": True, "shallow_window": 6, "split": (2, 1, 1)},
    {"boundary": "threshold", "bridge": True, "split": (1, 0, 3)},
    {"rate": 1.0, "family": "mistral"},
]


def made(**settings):
    """The same model at every call, as if a folder held it."""
    model = tiny_online(**settings)
    model.source_sha256 = "0" * 64
    return model


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_conversation_that_was_saved_goes_on_bit_for_bit(settings, tmp_path):
    """Rows of different lengths, with the logits of the next tokens and all that comes later; what
    is loaded is what was saved."""
    model, other = made(**settings), made(**settings)
    ids, mask = left_padded([text(1, 20), text(1, 13, seed=1)])
    cache = model.new_cache(2)
    model(ids[:, :-1], attention_mask=mask[:, :-1], cache=cache)
    cache.save(tmp_path / "c", ids)
    loaded, text_ids = other.load_cache(tmp_path / "c")
    loaded.save(tmp_path / "again", text_ids)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "c").read_bytes()
    assert torch.equal(text_ids, ids) and torch.equal(loaded.concept_ids, cache.concept_ids)
    for one, at in ((cache, model), (loaded, other)):
        at.logits = at(ids[:, -1:], attention_mask=mask, cache=one).logits
    assert torch.equal(model.logits, other.logits)
    new = [
        at.generate(
            torch.cat([ids, ids[:, -1:]], 1),
            attention_mask=torch.cat([mask, mask[:, -1:]], 1),
            cache=one,
            **LONG,
        )
        for at, one in ((model, cache), (other, loaded))
    ]
    assert torch.equal(*new) and torch.equal(loaded.concept_ids, cache.concept_ids)


@pytest.fixture(scope="module")
def folder(base_folder, tmp_path_factory):
    """A saved model with its tokenizer, and ids of a text."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    online_over(base_folder, text(16, 24)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder, **named):
    return AutoModelForCausalLM.from_pretrained(folder, **named)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture
def file(model, tmp_path):
    ids = text(1, 20)
    cache = model.new_cache(1)
    model(ids[:, :-1], cache=cache)
    cache.save(tmp_path / "c.safetensors", ids)
    return tmp_path / "c.safetensors"


def test_another_process_goes_on(model, folder, file):
    program = (
        "import sys, torch, json; from transformers import AutoModelForCausalLM; import sememe;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "cache, ids = model.load_cache(sys.argv[2]);"
        f"print(model.generate(ids, cache=cache, **{LONG}).tolist())"
    )
    said = subprocess.check_output([sys.executable, "-c", program, folder, file])
    assert json.loads(said) == model.generate(text(1, 20), **LONG).tolist()


def test_generate_goes_on_from_its_file(model, folder, tmp_path):
    """Two prompts in two calls are one text: the tokens are those of a model that reads it all."""
    file = tmp_path / "talk.safetensors"
    for prompt in ("the cat ", " and a dog"):
        said = sememe(
            "generate", folder, "--prompt", prompt, "--max-new-tokens", 9, "--cache", file
        )
        assert prompt in said
    tokenizer = byte_tokenizer()
    ids = tokenizer("the cat ", return_tensors="pt").input_ids
    for prompt in ("", " and a dog"):
        more = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([ids, more.long()], 1)
        ids = model.generate(ids, do_sample=False, max_new_tokens=9, pad_token_id=2)
    assert torch.equal(model.load_cache(file)[1], ids)


def refused(call, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        call()
    assert "try: " in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_saved_or_is_of_another_model_is_refused(model, folder, file, tmp_path):
    ids = text(1, 20)
    cache = model.new_cache(1)
    refused(lambda: cache.save(file, ids), "has read 0")
    model(ids, cache=cache)
    refused(lambda: cache.save(file, ids[:, 1:]), r"need \(1, 20 or more\)")
    refused(lambda: tiny_online().new_cache(1).save(file, ids), "no folder holds.*save_pretrained")
    with pytest.raises(SememeError, match=r"could not write .*try: "):
        cache.save(tmp_path / "no" / "folder", ids)
    load(folder, dtype="auto").load_cache(file)
    refused(lambda: load(folder, dtype=torch.bfloat16).load_cache(file), "its dtype")
    refused(lambda: load(folder, segment="none").load_cache(file), "does not fit")
    refused(lambda: made().load_cache(file), "of a model with sha256")


def test_files_that_are_none_are_refused(model, folder, file, tmp_path):
    for name in ("nowhere", "."):
        refused(lambda name=name: model.load_cache(tmp_path / name), "no saved cache.*no file")
    refused(lambda: model.load_cache("/dev/zero"), "no file is there")
    refused(lambda: model.load_cache(folder / "model.safetensors"), "do not say cache-1")
    (tmp_path / "empty").touch()
    refused(lambda: model.load_cache(tmp_path / "empty"), "no saved cache")
    data, draw = bytearray(file.read_bytes()), random.Random(0)
    for trial in range(60):
        at, bit = draw.randrange(len(data) if trial % 2 else 3000), 1 << draw.randrange(8)
        data[at] ^= bit
        file.write_bytes(data if trial % 3 else data[:at])
        refused(lambda: model.load_cache(file), "corrupt|no saved cache|of a model")
        data[at] ^= bit


@pytest.mark.parametrize(
    "name, change",
    [
        ("tokens", lambda x: x + 300),
        ("tokens", lambda x: x[:, 5:]),
        ("tokens", lambda x: x[0]),
        ("concept_ids", lambda x: x - 5),
        ("concept_ids", lambda x: x[:, :4]),
        ("gate.tokens", lambda x: x + 100),
        ("gate.tokens", lambda x: torch.cat([x, x])),
        ("gate.concepts", lambda x: x - 1),
        ("gate.tail", lambda x: x + 1),
        ("gate.sum", lambda x: x * torch.nan),
        ("last_state", lambda x: x[:, :3]),
        ("tails.real", lambda x: torch.cat([x, ~x], 1)),
        ("position.0", lambda x: x[:, 1:]),
        ("layers.2", lambda x: x[:, :, :, :-1]),
        ("layers.2", lambda x: x.double()),
        ("layers.3", lambda x: x * torch.inf),
        ("layers.9", lambda x: torch.zeros(3)),
    ],
)
def test_a_file_with_the_right_hash_and_wrong_content_is_refused(model, file, name, change):
    """Whoever can write a file can write its hash."""
    with safetensors.safe_open(file, "pt") as opened:
        words = opened.metadata()["sememe"].split()
    state = safetensors.torch.load_file(file)
    state[name] = change(state.get(name)).contiguous()
    words[-1] = saved._sha256(state, words[1])
    file.write_bytes(safetensors.torch.save(state, {"sememe": " ".join(words)}))
    refused(lambda: model.load_cache(file), "does not fit")
