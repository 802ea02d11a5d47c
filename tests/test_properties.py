"""Properties of the online model under any setting, padding and chunking. Deterministic: the same
examples everywhere."""

import functools

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from families import left_padded, stepwise, text, tiny_online
from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.head import HEADS
from sememe.concepts.segments import tail_lengths

# Logits are of order 10. Chunks and padding change the shapes of matmuls and with them the order of
# sums: 2e-5 at worst in 900 examples; a wrong mask, position or slot changed logits by 0.1 and
# more.
CLOSE = {"atol": 2e-4, "rtol": 0}

deterministic = functools.partial(settings, deadline=None, derandomize=True, database=None)


@functools.cache
def built(**settings):
    return tiny_online(**settings)


def tuned(weights: dict, dials: dict, feedback: float):
    """The model of a draw: built once for the same weights, its dials set."""
    model = built(**weights)
    for name, value in dials.items():
        setattr(model.dial if hasattr(model.dial, name) else model.config, name, value)
    model.writer.gate.feedback = feedback
    return model


@st.composite
def models(draw):
    """What `tuned` takes, for any model that can run."""
    weights = {
        "family": st.sampled_from(["llama", "mistral"]),
        "split": st.sampled_from([(1, 2, 1), (2, 1, 1), (1, 1, 2), (1, 0, 3)]),
        "boundary": st.sampled_from(
            [name for name, kind in BOUNDARIES.items() if not kind.offline]
        ),
        "head": st.sampled_from(list(HEADS)),
        "bridge": st.booleans(),
        "anchor": st.booleans(),
        "codes_per_concept": st.sampled_from([1, 2]),
    }
    max_tail = draw(st.integers(0, 12))
    dials = {
        "max_tail": st.just(max_tail),
        "rate": st.floats(1 / (max_tail + 1), 1.0),
        "quantise": st.sampled_from([1.0, 1.0, 0.5, 0.0]),
        "shallow_window": st.sampled_from([None, None, 1, 4]),
        "prefill_chunk": st.sampled_from([0, 5]),
    }
    return {
        "weights": draw(st.fixed_dictionaries(weights)),
        "dials": draw(st.fixed_dictionaries(dials)),
        "feedback": draw(st.sampled_from([0.1, 0.5, 0.0])),
    }


@st.composite
def batches(draw, longest: int = 26):
    """(ids, mask) of one to four left-padded rows of different lengths."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
    seed = draw(st.integers(0, 1000))
    return left_padded([text(1, n, seed=seed + row) for row, n in enumerate(lengths)])


@st.composite
def cuts(draw, length: int):
    """Where the chunks of a text end: the last one at its end."""
    inner = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())
    return [*sorted(draw(inner)), length]


@deterministic(max_examples=25)
@given(st.data())
@torch.no_grad()
def test_cached_is_parallel_and_rows_do_not_meet(data):
    """Any chunks of any batch: the logits of one pass, the same ids exactly; and each row as if it
    were alone."""
    model, (ids, mask) = tuned(**data.draw(models())), data.draw(batches())
    model.config.prefill_chunk, chunk = 0, model.config.prefill_chunk
    whole, seen = model(ids, attention_mask=mask), mask.bool()
    model.config.prefill_chunk = chunk
    logits, _, cache = stepwise(model, ids, data.draw(cuts(ids.shape[1])), mask)
    torch.testing.assert_close(logits[seen], whole.logits[seen], **CLOSE)
    assert torch.equal(cache.concept_ids, whole.concept_ids)
    assert (whole.concept_ids[~seen] == -1).all()
    row = data.draw(st.integers(0, len(ids) - 1))
    alone = model(ids[row : row + 1, seen[row]])
    torch.testing.assert_close(whole.logits[row, seen[row]], alone.logits[0], **CLOSE)
    assert torch.equal(whole.concept_ids[row, seen[row]], alone.concept_ids[0])


@deterministic(max_examples=40)
@given(st.data())
@torch.no_grad()
def test_the_rate_is_within_what_tail_and_debt_allow(data):
    """At every prefix: no tail over max_tail, and as far from the asked rate as the scores of this
    text can push the gate: it writes unasked only above θ + gain · (concepts in advance), and does
    not write only below θ - gain · (concepts owed)."""
    model, length = tuned(**data.draw(models())), data.draw(st.integers(1, 96))
    ids = text(1, length, seed=data.draw(st.integers(0, 1000)))
    assume(model.writer.gate.feedback > 0)
    config = model.config
    written_BT = model(ids).concept_ids != -1
    assert int(tail_lengths(written_BT, torch.ones_like(written_BT)).max()) <= config.max_tail
    written, concepts = written_BT[0].tolist(), written_BT[0].cumsum(0)
    prefix = torch.arange(1, length + 1)
    assert (concepts >= (prefix / (config.max_tail + 1)).ceil()).all(), "forced after max_tail"
    if model.dial.rate == 1:
        assert all(written)
        return
    threshold, gain = model.writer.gate.threshold(model.dial.rate)
    scores = [0.0, *model.writer.scores(model.shallow_states(ids))[0].double().tolist()]
    pushes, total = [], 0.0
    for t in range(1, length):  # the sink has no say
        total = total + scores[t] if model.writer.gate.boundary.accumulates else scores[t]
        pushes.append(total)
        total = max(total - threshold, 0.0) if written[t] else total
    pushes = [(push - threshold) / gain for push in pushes] or [0.0]
    high, low = max(pushes), min(pushes)
    ahead = concepts.double() - model.dial.rate * prefix
    # Scores are computed in other shapes here: 1e-5 of them at worst.
    rounding = 1e-3 * (1 + abs(high) + abs(low))
    assert float(ahead.max()) <= max(high, 0.0) + 1 - model.dial.rate + rounding
    assert float(-ahead.min()) <= max(-low, 0.0) + model.dial.rate + rounding
