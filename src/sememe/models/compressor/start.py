"""What a compressor sets before it is trained, from (N, T) blocks of training text and its base's
own states, without gradient."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sememe.concepts.codebook import SHARPNESS, start_from_states
from sememe.concepts.dial import evaluating
from sememe.concepts.fit import fit, linear_fit, set_frame
from sememe.concepts.lengths import REMEMBERED
from sememe.concepts.segments import Chunk
from sememe.models.adapted import boundary_targets, fitted_blocks
from sememe.models.compressor.encode import decide, embed_text, token_states
from sememe.models.losses import cross_entropy

# Logits that votes may give the mean word's own vector at first: the best is found by trial.
VOTES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
TOKENS_AT_ONCE = 1024


def texts(model, ids_NT: Tensor) -> Iterator[Chunk]:
    """Blocks in batches, as in evaluation."""
    parts = ids_NT.to(model.device).split(max(1, TOKENS_AT_ONCE // ids_NT.shape[1]))
    with evaluating(model):
        # None: no bar where stderr is a pipe.
        for ids_BT in tqdm(parts, "base states", leave=False, disable=None):
            yield embed_text(model, ids_BT)


@contextmanager
def drawing(model, seed: int) -> Iterator[None]:
    """Lengths inside are drawn, as in training: what is started there is for segments that differ,
    and at first the likeliest lengths are all the same."""
    model.generator = torch.Generator(model.device).manual_seed(seed)
    yield
    model.generator = None


def predictions(model, ids_NT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(n, V) log-probabilities of the base, its adapters are still zero, and the (n,) tokens that
    stand there."""
    for text in texts(model, ids_NT):
        logits_BSV = model.backbone(input_ids=text.ids_BT, use_cache=False).logits.float()
        log_p_BSV = logits_BSV.log_softmax(-1)
        yield log_p_BSV[:, :-1].flatten(0, 1), text.ids_BT[:, 1:].flatten()


@torch.no_grad()
def start_frame(model, ids_NT: Tensor, rate: float | None = None) -> dict[str, float]:
    """Word bins or the frame of the embeddings, that of the codes, the boundary, and what concepts
    are as inputs. Returns shares of variance explained."""
    segments, text = model.writer.readout, embed_text(model, ids_NT.to(model.device))
    embed_nD = text.embed_BTD[:, 1:].flatten(0, 1).float()
    if segments.bins is not None:
        segments.bins.start(predictions(model, ids_NT))
    else:
        set_frame(segments.tokens.mean, segments.tokens.scale, embed_nD)
    model.decompressor.start(float(embed_nD.square().mean().sqrt()))
    h_NSD = torch.cat([token_states(model, part) for part in texts(model, ids_NT)])
    shares = model.writer.start_frame(h_NSD, boundary_targets(model, text.ids_BT))
    return shares | start_prefix(model, ids_NT)


@torch.no_grad()
def start_prefix(model, ids_NT: Tensor, seed: int = 0) -> dict[str, float]:
    """Concepts before a text begin as what the base can read, the mean of their words' embeddings.
    Returns the share of its variance explained."""
    x_nD, words_nD = [], []
    with drawing(model, seed):
        for text in texts(model, fitted_blocks(ids_NT)):
            decision, _ = decide(model, text)
            x_nD.append(model.writer.inputs(decision)[0])
            words_BCD, _ = decision.pack.pool(text.embed_BTD, text.valid_BT)
            words_nD.append(words_BCD[decision.coded_BC])
    decompressor = model.decompressor
    share = fit(decompressor.prefix, torch.cat(x_nD), torch.cat(words_nD) / decompressor.scale)
    return {"words_read": share}


@torch.no_grad()
def calibrate_gate(model, ids_NT: Tensor) -> None:
    """The gate's score distribution, or the lengths that are remembered, are those of a text."""
    if model.writer.gate.boundary.scored:
        model.writer.start_gate(
            torch.cat([token_states(model, text) for text in texts(model, ids_NT)])
        )
    if model.segmenter is not None:
        lengths = model.segmenter.lengths
        blocks = 1 + int(REMEMBERED / model.dial.rate) // ids_NT.shape[1]
        slots = [decide(model, text)[1] for text in texts(model, ids_NT[:blocks])]
        lengths.remember(torch.cat([lengths(x.state_BCD[x.rest_BC > 0]) for x in slots]))


@torch.no_grad()
def start_codes(model, ids_NT: Tensor, seed: int = 0) -> dict[str, float]:
    """Codes and head, gate, and what votes weigh. To be called when quantisation begins."""
    writer = model.writer
    with drawing(model, seed):
        if writer.readout.bins is None:
            x_nD = segment_states(model, ids_NT)
            figures = start_from_states(writer.codes, writer.head, x_nD, seed=seed)
        else:
            figures = spell_bins(writer)
        calibrate_gate(model, ids_NT)
    with drawing(model, seed), evaluating(model):
        return figures | weigh_votes(model, ids_NT[:32].to(model.device))


@torch.no_grad()
def segment_states(model, ids_NT: Tensor) -> Tensor:
    """(n, D) normalised states of all segments of a text, for the codes."""
    decisions = [decide(model, text)[0] for text in texts(model, ids_NT)]
    return torch.cat([model.writer.inputs(decision)[0] for decision in decisions])


def spell_bins(writer) -> dict[str, float]:
    """Codes that spell bins, instead of those of k-means; those that are left over belong to no
    segment at all."""
    codes, segments = writer.codes, writer.readout
    counts = segments.bins.counts
    codes.weight.zero_()
    for g, table_KD in enumerate(codes.weight):
        for length, part_nD in enumerate(table_KD[: sum(counts)].split(counts), 1):
            x_nD = segments.content(segments.bins.codes(g, length))
            if g == 0:
                x_nD = segments.mark(x_nD, torch.tensor(length))
            part_nD[: len(x_nD)] = x_nD
        sharpness = torch.tensor(SHARPNESS / table_KD.shape[1], device=table_KD.device)
        writer.head.start(g, table_KD.float(), sharpness)
    return {"codes": float(sum(counts))}


def weigh_votes(model, ids_BT: Tensor) -> dict[str, float]:
    """The weight of votes with which the untrained model writes a little text best."""
    decompressor = model.decompressor
    embed_VD, out_VD = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    map_DD, unit = torch.eye(embed_VD.shape[1]), 1.0
    if (tokens := decompressor.segments.tokens) is not None:
        size = out_VD.float().square().mean().sqrt()
        unit = 1 / float(size * len(map_DD))
        if out_VD is not embed_VD:
            map_DD = linear_fit(tokens.normalise(embed_VD), out_VD / size, 1e-4)[0].T
    decompressor.vote.weight.copy_(map_DD)
    encoded = model.encode(ids_BT)
    covering = model.covering(encoded)
    h_BSD = decompressor.states(encoded.text, *covering)
    nll = {}
    for weight in VOTES:
        decompressor.gain.fill_(weight * unit)
        logits_BSV = decompressor.logits(h_BSD, *covering)
        nll[weight] = float(cross_entropy(logits_BSV[:, :-1], ids_BT).mean())
    best = min(nll, key=nll.get)
    decompressor.gain.fill_(best * unit)
    return {"vote": best, "vote_nll": nll[best]}
