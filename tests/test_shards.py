"""Corpora on disk: token shards, mixtures, documents and conversations row by row."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import byte_tokenizer, ctrl_c, run, sememe
from families import tiny_base, tiny_online
from sememe import chats, rows, shards, texts
from sememe.data import heldout_blocks
from sememe.errors import DataError, Interrupted, RecipeError, SememeError
from sememe.models import ControlConfig, ControlForCausalLM
from sememe.options import check_recipe
from test_data import BYTE_LEVEL, WORDS

STORIES = [f"Story {n}: {WORDS * (n % 4)}" for n in range(40)] + ["", " \n"]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Texts of three kinds, in shards of a few hundred bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "TEXT_BYTES", 700)
    lines = [json.dumps({"body": text}) for text in STORIES]
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + (WORDS * 3000 + "é ü\r\n").encode())
    pq.write_table(pa.table({"n": [1] * 42, "text": STORIES}), "a.parquet", row_group_size=9)
    (tmp_path / "blank.txt").write_text(" \n ")
    return ["a.parquet", "b.jsonl#body", "c.txt", "blank.txt"]


def write(sources, folder, tokenizer=BYTE_LEVEL, **options):
    shards.tokenize(sources, tokenizer, folder, say=lambda line: None, **options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_the_tokens_of_the_texts_for_any_number_of_workers(corpus, tmp_path):
    one, two = (write(corpus, tmp_path / str(n), workers=n) for n in (1, 2))
    assert one == two and len(one) > 12
    stream = shards.TokenShards(tmp_path / "1", BYTE_LEVEL)
    whole = [text for source in corpus[:3] for text in texts.read_texts(source)]
    at_once = shards.TextShard(whole, BYTE_LEVEL)
    expected = at_once.read("tokens", 0, len(at_once))
    assert stream.read("tokens", 0, len(stream)).tolist() == expected.tolist()
    source = "".join(text for text in whole if text.strip()).encode()
    assert stream.read("bytes", 0, len(stream)).sum() == len(source)
    assert stream.part(0, "tokens").dtype == np.uint16 and stream.part(0, "bytes").dtype == np.uint8
    middle = int(stream.ends[2]) - 3  # over the end of a shard
    assert stream.read("tokens", middle, 9).tolist() == expected[middle : middle + 9].tolist()


def test_what_was_killed_goes_on_and_is_the_same(corpus, tmp_path):
    """Some shards are there, one is cut off, one is flipped, one is half written."""
    whole, out = write(corpus, tmp_path / "whole"), tmp_path / "out"
    out.mkdir()
    for name, content in sorted(whole.items())[:5]:
        (out / name).write_bytes(content)
    (out / "000001.safetensors").write_bytes(whole["000001.safetensors"][:-5])
    (out / "000002.safetensors").write_bytes(whole["000002.safetensors"][:-1] + b"\xff")
    (out / ".000009.safetensors.1.tmp").write_bytes(b"half")
    said, kept = [], (out / "000003.safetensors").stat().st_mtime_ns
    shards.tokenize(corpus, BYTE_LEVEL, out, say=said.append)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert said == [f"3 of {len(whole) - 1} shards were there, as they were written"]
    assert (out / "000003.safetensors").stat().st_mtime_ns == kept
    (out / "000000.safetensors").unlink()  # of a finished folder
    shards.tokenize(corpus, BYTE_LEVEL, out, say=said.append)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


@pytest.mark.reliability
def test_kill_9_at_any_moment(corpus, tmp_path, monkeypatch):
    """With none, some and more shards there; what is there in the end is what one process wrote."""
    (tmp_path / "big.txt").write_text(WORDS * 100_000)
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_base(vocab_size=512).save_pretrained(base)
    BYTE_LEVEL.save_pretrained(base)
    script = "import sememe.shards as s; s.TEXT_BYTES = 1 << 18; import sememe.cli as c; c.main()"
    (tmp_path / "run.py").write_text(f"if __name__ == '__main__':\n    {script}\n")
    words = f"run.py tokenize big.txt --base {base} --out {out} --workers 2".split()
    for there in (-1, 2, 9, None):
        command = subprocess.Popen([sys.executable, *words], cwd=tmp_path)
        if there is None:
            assert command.wait() == 0
            break
        while len([*out.glob("*.safetensors")]) <= there:
            assert command.poll() is None
            time.sleep(0.01)
        command.send_signal(signal.SIGKILL)
        command.wait()
        time.sleep(0.5)  # its processes see that it is gone
    monkeypatch.setattr(shards, "TEXT_BYTES", 1 << 18)
    one = write(["big.txt"], tmp_path / "one")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == one and len(one) == 22


def test_faults_are_one_sentence(corpus, tmp_path):
    out = tmp_path / "out"
    for sources, match in (
        (["none.txt"], "none.txt does not exist"),
        ([str(tmp_path)], "is a folder"),
        (["blank.txt"], "no character other than white space"),
        (["a.parquet#n"], r"a.parquet line 1 has no field 'n' of text"),
        (["bad.txt"], "bad.txt cannot be read"),
        (["blank.jsonl"], "no character other than white space"),
    ):
        (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
        (tmp_path / "blank.jsonl").write_text('{"text": " "}')
        with pytest.raises(DataError, match=match):
            write(sources, tmp_path / sources[0].replace("/", "-").replace(".", "-"))
    write(corpus, out)
    with pytest.raises(SememeError, match="is not of these texts"):
        write(["c.txt"], out)
    with pytest.raises(SememeError, match="is not of these texts"):
        write(["c.txt"], tmp_path)
    with pytest.raises(DataError, match="of another tokenizer"):
        shards.TokenShards(out, byte_tokenizer())
    shard = out / "000001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\xff")
    stream = shards.TokenShards(out, BYTE_LEVEL)
    with pytest.raises(DataError, match=r"000001.safetensors is damaged \(sha256"):
        stream.read("tokens", 0, len(stream))
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"000001\.safetensors is damaged"):
        shards.TokenShards(out, BYTE_LEVEL)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match="no finished folder of token shards"):
        shards.TokenShards(out, BYTE_LEVEL)


@pytest.fixture
def folders(texts, tmp_path, monkeypatch):
    """The texts of the recipe as folders of token shards."""
    monkeypatch.setattr(shards, "TEXT_BYTES", 5000)
    names = [str(tmp_path / path.stem) for path in texts]
    for path in texts:
        shards.tokenize([str(path)], byte_tokenizer(), tmp_path / path.stem)
    return names


def test_a_folder_is_a_text_of_a_recipe(recipe_values, folders, tmp_path, texts):
    """Stopped and resumed it reads on in the same order; what it was made of counts as read."""
    recipe_values["data"] = dict(zip(("train", "heldout"), folders, strict=True))
    whole = run(recipe_values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted):
        run(recipe_values, tmp_path / "stopped")
    stopped = run(recipe_values, tmp_path / "stopped")
    assert [line["loss"] for line in stopped] == [line["loss"] for line in whole]
    assert evaluated(tmp_path / "whole", 64)["tokens"] == 2 * 31
    inputs = json.loads((tmp_path / "whole" / "inputs.json").read_text())
    assert len(inputs["train"]["sources"]) == 1
    for trained in (folders[0], str(texts[0])):  # the folder, and what it was made of
        message = sememe("evaluate", tmp_path / "whole", "--data", trained, code=1)
        assert "is what" in message and "was trained on" in message
    (tmp_path / "train" / "manifest.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"data\.train"):
        run(recipe_values | {"steps": 9}, tmp_path / "whole")


def test_mixtures_have_exact_shares_and_whole_epochs():
    class Numbers(list):
        ragged = False

    sources = [Numbers(range(start, start + n)) for start, n in ((0, 50), (100, 20), (200, 7))]
    mixture = rows.Mixture(sources, [0.5, 0.3, 0.2], seed=3)
    drawn = [mixture[i] for i in range(1000)]
    for n in (10, 64, 333, 1000):
        counts = Counter(x // 100 for x in drawn[:n])
        assert all(abs(counts[s] - n * w) <= 2 for s, w in enumerate((0.5, 0.3, 0.2))), counts
    for number, source in enumerate(sources):
        own = [x for x in drawn if x // 100 == number]
        first, second = own[: len(source)], own[len(source) : 2 * len(source)]
        assert sorted(first) == sorted(second) == list(source) and first != second
    assert drawn[700:] == [rows.Mixture(sources, [5, 3, 2], seed=3)[i] for i in range(700, 1000)]
    assert drawn[:99] != [rows.Mixture(sources, [5, 3, 2], seed=4)[i] for i in range(99)]
    assert sum(mixture.shares) == Fraction(1)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_a_shuffle_is_a_permutation(count):
    entries = [rows.shuffled(i, count, 5) for i in range(2 * count)]
    assert sorted(entries[:count]) == sorted(entries[count:]) == list(range(count))
    if count == 1000:
        assert abs(np.corrcoef(entries[:count], range(count))[0, 1]) < 0.1
    assert rows.shuffled(10**10, 10**9 + 7, 5) < 10**9 + 7


def test_a_mixture_trains_and_resumes(recipe_values, folders, tmp_path, texts):
    recipe_values["data"]["train"] = {folders[0]: 3, str(texts[0]): 1}
    assert check_recipe(recipe_values, "r").data.train[folders[0]] == 3
    assert run(recipe_values, tmp_path / "run")[-1]["step"] == 8
    recipe_values["data"]["train"][folders[0]] = 2.0
    with pytest.raises(RecipeError, match=r"data\.train"):
        run(recipe_values, tmp_path / "run")
    recipe_values["data"]["train"] = {}
    with pytest.raises(RecipeError, match="need a text, or several"):
        check_recipe(recipe_values, "r")


def evaluated(folder, tokens):
    sememe("evaluate", folder, "--tokens", tokens)
    return json.loads((folder / "evaluate.json").read_text())


# ---- documents row by row ----


def test_rows_of_documents(corpus, tmp_path):
    write(["b.jsonl#body", "blank.txt"], tmp_path / "out", documents=True)
    of = rows.rows_of(str(tmp_path / "out"), BYTE_LEVEL, 16, 0)
    found = [of[n].ids.tolist() for n in range(len(of))]
    eos = BYTE_LEVEL.eos_token_id
    expected = []
    for text in filter(str.strip, STORIES):
        ids = [*BYTE_LEVEL.encode(text), eos]
        expected += [ids[start : start + 16] for start in range(0, len(ids) - 1, 16)]
    assert found[: len(expected)] == expected
    assert all(len(row) > 1 for row in found)
    blocks = heldout_blocks(str(tmp_path / "out"), BYTE_LEVEL, 16, 64)
    assert (blocks.ids_NT == -100).sum() == (~blocks.counted_NT).sum() > 0


def tiny_control(**settings) -> ControlForCausalLM:
    """One that leaves layers out where `left_out` says so: `prune`."""
    base = tiny_base()
    config = ControlConfig(text_config=base.config, base="tiny", lora_rank=4, **settings)
    return ControlForCausalLM(config, base)


def tiny_pruned() -> ControlForCausalLM:
    return tiny_control(left_out=[1], bridge=True)


@pytest.mark.parametrize("make", [tiny_online, tiny_control, tiny_pruned])
def test_a_document_has_the_logits_that_it_has_alone(make, tmp_path, corpus):
    """Whatever stands in the batch beside it. 1.4e-5 was seen, since sums of other shapes round
    otherwise; one token more that it saw would be 1e-2."""
    write(["b.jsonl#body"], tmp_path / "out", documents=True)
    of = rows.rows_of(str(tmp_path / "out"), BYTE_LEVEL, 24, 0)
    model = make().eval()
    short = next(of[n].ids for n in range(len(of)) if len(of[n].ids) < 20) % 64
    for seed in (0, 1):
        other = torch.randint(64, (24,), generator=torch.Generator().manual_seed(seed))
        ids_BT = torch.stack([torch.from_numpy(np.pad(short, (0, 24 - len(short)))), other])
        mask_BT = torch.arange(24) < torch.tensor([[len(short)], [24]])
        both = model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits[0, : len(short)]
        alone = model(input_ids=torch.from_numpy(short)[None]).logits[0]
        torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("system", ["online", "control", "prune"])
def test_training_on_documents(recipe_values, tmp_path, system):
    names = []
    for name in ("train", "heldout"):
        lines = [json.dumps({"text": f"{name} {n} " * (1 + n % 5)}) for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        names.append(str(tmp_path / name))
        sources = [str(tmp_path / f"{name}.jsonl")]
        shards.tokenize(sources, byte_tokenizer(), tmp_path / name, documents=True)
    recipe_values["data"] = dict(zip(("train", "heldout"), names, strict=True))
    more = {"leave_out": [1]} if system == "prune" else {}
    lines = run(recipe_values | {"system": system} | more, tmp_path / "run")
    assert lines[-1]["tokens"] < 8 * 2 * 32 and np.isfinite(lines[-1]["heldout_nll"])
    figures = evaluated(tmp_path / "run", 64)
    assert figures["tokens"] < 64 and np.isfinite(figures["nll"])
    if system == "online":
        assert 0 < figures["concept_rate"] <= 1
        sememe("ablate", tmp_path / "run", "--tokens", 64)
        with pytest.raises(RecipeError, match="cannot be trained on documents"):
            run(recipe_values | {"system": "compressor"}, tmp_path / "other")


# ---- conversations ----

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}(thinks){% endif %}"
    "{{ m['content'] | trim }}</s>\n{% endfor %}"
)
TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": " Hi! "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good bye"},
]


def chat_tokenizer(template: str = CHATML):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_answers_alone_are_learned(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "\n".join(json.dumps({"messages": talk}) for talk in (TALK, TALK[:1], TALK[:2]))
    )
    tokenizer, source = chat_tokenizer(), f"{path}#messages"
    of = rows.rows_of(source, tokenizer, 200, 10_000)
    assert len(of) == 2, "one has no answer"
    ids, counted = torch.from_numpy(of[0].ids), torch.from_numpy(of[0].counted)
    assert tokenizer.decode(ids[counted]) == "Hi!</s>Good bye</s>"
    assert of[0].bytes.sum() == len("Hi!Good bye")
    short = rows.rows_of(source, tokenizer, 45, 10_000)
    assert len(short[0].ids) == 45 and short[0].counted.any()


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "this base has no chat template"),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            "answers that the base's",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] }}", "answers that the base's"),
    ],
)
def test_templates_that_do_not_fit(tmp_path, template, match):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": TALK}))
    with pytest.raises(DataError, match=match):
        rows.rows_of(f"{path}#messages", chat_tokenizer(template), 64, 100)
    path.write_text(json.dumps({"messages": [{"role": "user"}]}))
    with pytest.raises(DataError, match="no conversation in 'messages'"):
        list(chats.chat_rows(f"{path}#messages", chat_tokenizer(), 64, 100))


def test_training_on_conversations(recipe_values, base_folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in base_folder.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    chat_tokenizer().save_pretrained(base)
    for name in ("train", "heldout"):
        talks = [[m | {"content": f"{m['content']} {n}"} for m in TALK] for n in range(20)]
        lines = (json.dumps({"messages": talk, "set": name}) for talk in talks)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    values = recipe_values | {"base": str(base), "sequence_length": 64}
    values["data"] = {x: f"{tmp_path / x}.jsonl#messages" for x in ("train", "heldout")}
    lines = run(values, tmp_path / "run")
    assert np.isfinite(lines[-1]["heldout_nll"])
    figures = evaluated(tmp_path / "run", 500)
    assert 0 < figures["tokens"] < 250, "answers are counted alone"


def test_the_command(texts, base_folder, tmp_path):
    words = "tokenize", texts[1], "--base", base_folder, "--out", tmp_path / "out"
    out = sememe(*words)
    assert "tokens of" in out and "in 1 shards" in out
    assert "1 of 1 shards were there" in sememe(*words)
    assert list(itertools.chain(os.listdir(tmp_path / "out"))) and "locked" not in out
