"""The engine: what a request gets does not depend on who else is there."""

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import byte_tokenizer
from families import text, tiny_base, tiny_online
from sememe.engine import Engine, QueueFull, Request, Sampling
from sememe.engine.holding import ROWS, Policy
from sememe.engine.sampling import draw, logprobs
from sememe.engine.text import TextStream
from sememe.errors import DataError
from sememe.models.configuration import ControlConfig
from sememe.models.control import ControlForCausalLM
from sememe.models.stepping import rows_of

TOKENIZER = byte_tokenizer()


class Letters:
    """One letter a token."""

    def decode(self, ids, **options):
        return "".join(chr(32 + int(i)) for i in ids)

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": [ord(letter) - 32 for letter in text]})


def prompt(number: int) -> list[int]:
    return text(1, 2 + number % 40, number)[0].tolist()


def requests(count: int, **settings) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(
            prompt(n),
            max_tokens=int(rng.integers(0, 20)),
            sampling=Sampling(temperature=float(n % 2), seed=n, top_p=0.9, top_k=n % 5 * 7),
            rate=[None, 0.3, 0.7, 1.0][n % 4],
            logprobs=2,
            **settings,
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("hold", [True, False])
def test_company_changes_no_answer(hold):
    model = tiny_online(segment="both", bridge=True)
    wanted = requests(40)
    with Engine(model, Letters(), max_rows=14, chunk=16, hold=hold) as engine:
        if hold:  # whatever was measured
            engine.scheduler.policy = lambda rows, rate: (rows // 2, 4)
        together = engine.generate(wanted)
    with Engine(model, Letters(), max_rows=1) as engine:
        alone = engine.generate(wanted)
    for one, other, request in zip(together, alone, wanted, strict=True):
        assert one.tokens == other.tokens and one.concept_ids == other.concept_ids
        assert len(one.tokens) == request.max_tokens and one.finish == "length"
        read = len(request.prompt) + max(0, request.max_tokens - 1)
        assert len(one.concept_ids) == read
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.token == b.token and abs(a.logprob - b.logprob) < 1e-4


BASELINES = {}, {"window": 1}, {"window": 7}, {"skipped": (1, 3)}, {"left_out": (1, 3)}


@torch.no_grad()
def baseline(settings: dict, family: str) -> ControlForCausalLM:
    """With maps in the gaps that change something."""
    base, bridge = tiny_base(family), "left_out" in settings
    config = ControlConfig(text_config=base.config, lora_rank=0, bridge=bridge, **settings)
    model = ControlForCausalLM(config, base).eval()
    if bridge:
        model.start_bridge(text(32, 24))
    return model


def test_rows_wait_where_weights_cost_and_not_where_rows_do():
    by_weights, by_rows = [1.0] * len(ROWS), [float(rows) for rows in ROWS]
    assert Policy((4, 22, 4), by_weights, by_weights)(16, 0.25)[0] > 1
    for rows in (1, 2, 16, 40):
        assert Policy((4, 22, 4), by_rows, by_rows)(rows, 0.25) == (1, 0)
    # Nothing is won where the middle is small, or where all write at every step.
    assert Policy((14, 2, 14), by_weights, by_weights)(16, 0.25) == (1, 0)
    assert Policy((4, 22, 4), by_weights, by_weights)(16, 1.0) == (1, 0)


@pytest.mark.parametrize("hold", [(1, 0), (4, 4)])
def test_what_is_played_through_is_what_takes_place(hold, monkeypatch):
    """Where every call of a layer costs a second."""
    model = tiny_online(boundary="surprise", rate=0.25)
    policy = Policy(tuple(model.config.split), [1.0] * len(ROWS), [0.0] * len(ROWS))
    rows, run, calls, written = rows_of(model), model.spine.run, [], []
    for n in range(8):
        cache = rows.start([None])
        rows.read(cache, [text(1, 9 + n, n)[0].tolist()])
        rows.join(cache, [1])

    def counted(first, last, *args, **options):
        calls.append(last - first)
        return run(first, last, *args, **options)

    monkeypatch.setattr(model.spine, "run", counted)
    for n in range(100):
        tokens = text(1, len(rows.ready) + 1, n)[0, 1:].tolist()
        written += rows.step(tokens, *hold).concept_n
    rate = sum(concept != -1 for concept in written) / len(written)
    played = policy.speed(8, rate, hold)
    assert abs(played - len(written) / sum(calls)) < 0.15 * played, (rate, played)


def test_the_engine_says_what_generate_says():
    for model in (tiny_online(), tiny_base()):
        wanted = [Request(prompt(n), max_tokens=9) for n in range(6)]
        with Engine(model, Letters(), max_rows=4, chunk=8) as engine:
            answers = engine.generate(wanted)
        for request, answer in zip(wanted, answers, strict=True):
            ids = torch.tensor([request.prompt])
            options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}
            assert model.generate(ids, **options)[0, ids.shape[1] :].tolist() == answer.tokens


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("settings", BASELINES, ids=str)
def test_a_baseline_says_what_generate_says(settings, family):
    """Rows of other lengths that join, leave and read left-padded prompts and parts of them."""
    model = baseline(settings, family)
    wanted = [Request(prompt(n), max_tokens=5 + n % 7) for n in range(14)]
    with Engine(model, Letters(), max_rows=5, chunk=16) as engine:
        answers = engine.generate(wanted)
        own, base = engine.bytes_at(40, 0)
    for request, answer in zip(wanted, answers, strict=True):
        ids = torch.tensor([request.prompt])
        options = {"do_sample": False, "max_new_tokens": request.max_tokens, "eos_token_id": None}
        assert model.generate(ids, **options)[0, ids.shape[1] :].tolist() == answer.tokens
    assert own / base == pytest.approx(model.config.cache_share(40))


@pytest.mark.parametrize("model", [tiny_online(segment="both", bridge=True), tiny_base()])
def test_choices_of_one_request_read_their_prompt_once(model, monkeypatch):
    """And get what each would alone; requests that only say the same read it each for itself."""

    def wanted(ids, echo):
        settings = {"max_tokens": 12, "logprobs": 1, "echo": echo}
        seeds = [Sampling(temperature=1.0, seed=seed) for seed in range(3)]
        return [Request(ids, sampling=sampling, **settings) for sampling in seeds]

    first, second = prompt(22), prompt(30)
    requests = [*wanted(first, False), *wanted(second, True), *wanted(list(first), False)]
    read: list[int] = []
    with Engine(model, Letters(), max_rows=9, chunk=8) as engine:
        rows, held = engine.scheduler.rows, threading.Event()
        original = rows.read

        def reading(cache, texts):
            held.wait(10)
            if len(texts[0]) > 1:
                read.append(sum(map(len, texts)))
            return original(cache, texts)

        monkeypatch.setattr(rows, "read", reading)
        threading.Timer(0.2, held.set).start()
        shared = engine.generate(requests)
    assert sum(read) == 2 * len(first) + len(second)
    with Engine(model, Letters(), max_rows=1) as engine:
        alone = engine.generate(requests)
    assert [x.tokens for x in shared] == [x.tokens for x in alone]
    assert [x.concept_ids for x in shared] == [x.concept_ids for x in alone]
    for one, other in zip(shared, alone, strict=True):
        assert [x and x.token for x in one.logprobs] == [x and x.token for x in other.logprobs]
    assert len({tuple(x.tokens) for x in shared[:3]}) == 3


def test_a_long_prompt_whose_client_has_gone_is_not_read_on():
    with Engine(tiny_online(), Letters(), chunk=4) as engine:
        seen: list = []
        engine.observe(seen.append)
        ended = threading.Event()
        jobs: list = []

        def sink(progress):
            if progress.finish is None and progress.concept_ids:
                jobs[0].cancelled = True
            elif progress.finish is not None:
                assert progress.finish == "cancelled"
                ended.set()

        jobs.append(engine.submit(Request(prompt(39) * 2, max_tokens=1), sink))
        assert ended.wait(10)
    assert len(seen) < len(prompt(39) * 2) // 4


def test_nobody_waits_for_others_before_or_after_a_chunk():
    """A client would wait for both."""
    with Engine(tiny_online(boundary="surprise"), Letters(), chunk=8) as engine:
        scheduler, seen = engine.scheduler, []
        scheduler.policy = lambda rows, rate: (rows + 1, 50)
        engine.observe(lambda x: seen.append(("prefill" in x.seconds, len(scheduler.rows.waiting))))
        engine.generate([Request(prompt(n + 8), max_tokens=30 + 9 * n) for n in range(6)])
    assert any(waiting for _, waiting in seen)
    for (before, _), (reads, waiting) in pairwise(seen):
        assert not (waiting and (before or reads))


def test_the_token_that_ends_a_text_has_a_probability():
    model, ids = tiny_online(), prompt(9)
    with Engine(model, Letters()) as engine:
        request = Request(ids, max_tokens=5, logprobs=0, ends=frozenset(range(97)))
        (answer,) = engine.generate([request])
    assert answer.tokens == [] and answer.finish == "stop" and len(answer.logprobs) == 1


@pytest.mark.parametrize("broken", ["start", "join"])
def test_requests_that_fail_while_they_join_are_answered(broken, monkeypatch):
    with Engine(tiny_online(), Letters()) as engine:
        seen: list = []
        engine.observe(seen.append)

        def faulty(*args):
            monkeypatch.undo()
            raise MemoryError

        monkeypatch.setattr(engine.scheduler.rows, broken, faulty)
        first, second = (engine.generate([Request(prompt(3), max_tokens=5)])[0] for _ in range(2))
        assert first.finish == "error" and second.finish == "length" and engine.pending == 0
    assert sum(one.middle_rows for one in seen) > 0 and seen[-1].rows == 0
    assert max(one.cache_bytes["deep"] for one in seen) > 0


def test_echo_gives_the_probabilities_of_the_prompt():
    model, ids = tiny_online(), prompt(30)
    with Engine(model, Letters(), chunk=7) as engine:
        (answer,) = engine.generate([Request(ids, max_tokens=0, logprobs=3, echo=True)])
    with torch.inference_mode():
        wanted = logprobs(model(torch.tensor([ids])).logits[0, :-1], ids[1:], 3)
    assert answer.logprobs[0] is None and answer.tokens == []
    for one, other in zip(answer.logprobs[1:], wanted, strict=True):
        assert one.token == other.token and abs(one.logprob - other.logprob) < 1e-4
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_rows_leave_when_they_are_cancelled_and_the_others_go_on():
    model, ended = tiny_online(), threading.Event()
    with Engine(model, Letters(), max_rows=3) as engine:
        seen = []

        def sink(progress):
            seen.append(progress)
            if len(seen) == 3:
                engine.cancel(job)
            if progress.finish:
                ended.set()

        job = engine.submit(Request(prompt(4), max_tokens=200), sink)
        (answer,) = engine.generate([Request(prompt(5), max_tokens=12)])
        assert ended.wait(30) and seen[-1].finish == "cancelled" and len(seen) < 10
        assert len(answer.tokens) == 12
        assert len(engine.scheduler.rows) == 0 and engine.pending == 0


def test_a_fault_ends_those_under_way_and_the_next_are_served(monkeypatch):
    model = tiny_online()
    with Engine(model, Letters()) as engine:
        step = engine.scheduler.rows.step

        def faulty(*args):
            monkeypatch.undo()
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine.scheduler.rows, "step", faulty)
        first, second = (engine.generate([Request(prompt(3), max_tokens=5)])[0] for _ in range(2))
        assert step and first.finish == "error" and second.finish == "length"
        assert engine.alive


def test_a_full_queue_and_bad_prompts_are_refused():
    model = tiny_online()
    with Engine(model, Letters(), max_rows=1, max_queue=0) as engine:
        engine.submit(Request(prompt(1), max_tokens=150), lambda progress: None)
        with pytest.raises(QueueFull, match="try"):
            engine.submit(Request(prompt(1)), lambda progress: None)
        wrong = [Request([]), Request([97]), Request([5] * 250, max_tokens=7)]
        wrong += [Request([5], logprobs=98), Request([5], sampling=Sampling(logit_bias={97: 1.0}))]
        for bad in wrong:
            with pytest.raises(DataError, match="try"):
                engine.submit(bad, lambda progress: None)


def test_draws_follow_the_probabilities():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    wanted = logits_V.softmax(-1)
    points = (torch.arange(4000) + 0.5) / 4000

    def shares(sampling):
        tokens = [draw(logits_V, sampling, float(u)) for u in points]
        return torch.bincount(torch.tensor(tokens), minlength=4) / len(tokens)

    assert (shares(Sampling(temperature=1.0)) - wanted).abs().max() < 1e-3
    two = wanted[:2] / wanted[:2].sum()
    for sampling in (Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.7)):
        assert (shares(sampling)[:2] - two).abs().max() < 1e-3
    assert shares(Sampling(temperature=1.0, top_p=0.0))[0] == 1


@pytest.mark.parametrize("cut", range(1, 12))
def test_nothing_of_a_stop_string_gets_out(cut):
    ids = Letters()("one STOP two").input_ids
    stream = TextStream(Letters(), [], ["STOP", "XX"])
    said = stream.add(ids[:cut]) + stream.add(ids[cut:]) + stream.end()
    assert said == "one " and stream.stopped
    stream = TextStream(Letters(), [], ["STOP"])
    said = "".join(stream.add([token]) for token in Letters()("S STO").input_ids)
    assert said == "S " and stream.end() == "STO" and not stream.stopped


LETTERS = st.text("ab é😀漢", max_size=30)


@settings(max_examples=200, deadline=None)
@given(LETTERS, st.lists(st.text("ab é😀漢", min_size=1, max_size=5), max_size=4), st.data())
def test_nothing_of_a_stop_string_is_ever_shown(written, stops, data):
    """However its bytes are spread over tokens, and its tokens over steps."""
    tokens = TOKENIZER(written, add_special_tokens=False).input_ids
    stream, shown, stopped = TextStream(TOKENIZER, [], stops), "", ""
    while tokens:
        count = data.draw(st.integers(1, len(tokens)))
        shown += stream.add(tokens[:count])
        tokens = tokens[count:]
        assert written.startswith(shown)
    shown += stream.end()
    for end in range(len(written) + 1):
        ending = [stop for stop in stops if written[:end].endswith(stop)]
        stopped = written[: end - max(map(len, ending), default=0)]
        if ending:
            break
    assert shown == stopped and stream.stopped == bool(ending)
