"""What a compressor sets before it is trained, from (N, T) blocks of training text and its base's
own states, without gradient."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sememe.concepts.bins import rotate
from sememe.concepts.codebook import SHARPNESS, start_from_states
from sememe.concepts.dial import evaluating
from sememe.concepts.fit import fit, linear_fit, set_frame
from sememe.concepts.kmeans import assign, kmeans
from sememe.concepts.lengths import REMEMBERED
from sememe.concepts.segments import Chunk
from sememe.models.compressor.encode import decide, embed_text, token_states
from sememe.models.fitting import boundary_targets, fitted_blocks
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


def stage_parts(model, text: Chunk) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each stage of codes is to say of a text's segments, the g-th of the g-th token, the last
    of all that are left: (n, D) normalised states without marks, the (n, D) mean embedding of those
    words, and the (n,) lengths of the segments."""
    readout, (decision, _) = model.writer.readout, decide(model, text)
    pack, stages = decision.pack, model.config.codes_per_concept
    part_BTD, offset_BT, length_BC = readout.parts(
        token_states(model, text), text, pack, decision.written_BT
    )
    parts = []
    for g in range(stages):
        mine_BT = (offset_BT == g) | ((offset_BT > g) & (g == stages - 1))
        mean_BCD, _ = pack.pool(part_BTD * mine_BT.unsqueeze(-1), text.valid_BT)
        words_BCD, _ = pack.pool(text.embed_BTD, text.valid_BT & mine_BT)
        there_BC = decision.coded_BC & (length_BC > g)
        x_BCD = readout.content(mean_BCD * length_BC.unsqueeze(-1))
        parts.append((x_BCD[there_BC], words_BCD[there_BC], length_BC[there_BC]))
    return parts


def collected(model, ids_NT: Tensor) -> list[list[Tensor]]:
    """`stage_parts` of all blocks, together."""
    batches = [stage_parts(model, text) for text in texts(model, ids_NT)]
    return [[torch.cat(x) for x in zip(*part, strict=True)] for part in zip(*batches, strict=True)]


@torch.no_grad()
def start_prefix(model, ids_NT: Tensor, seed: int = 0) -> dict[str, float]:
    """Codes before a text begin as what the base can read, embeddings of their words. Returns the
    share of the embeddings' variance explained."""
    with drawing(model, seed):
        parts = collected(model, fitted_blocks(ids_NT))
    stage_n = torch.cat([torch.full_like(length_n, g) for g, (_, _, length_n) in enumerate(parts)])
    x_nD, words_nD = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    decompressor = model.decompressor
    share = fit(decompressor.prefix, rotate(x_nD, -stage_n), words_nD / decompressor.scale)
    return {"words_read": share}


@torch.no_grad()
def word_codes(model, ids_NT: Tensor, seed: int) -> list[Tensor | None]:
    """For each stage of codes a table by k-means of what it is to say. Where that is one word,
    centroids become words: the base can read a word, and not the mean of several (docs/log.md)."""
    readout, codes = model.writer.readout, model.writer.codes
    word_VD = readout.content(readout.tokens.normalise(model.get_input_embeddings().weight))
    tables, parts = [], collected(model, ids_NT)
    for g, (x_nD, _, length_n) in enumerate(parts):
        if not len(x_nD):
            tables.append(None)
            continue
        point_nD = x_nD if g else readout.mark(x_nD, length_n)
        table_KD, _ = kmeans(point_nD, codes.num_concepts, seed=seed + g)
        length_K = readout.length(table_KD)
        if g < len(parts) - 1 or int(length_n.max()) <= len(parts):
            stage_K = torch.full_like(length_K, g)
            nearest_K, _ = assign(rotate(readout.content(table_KD), -stage_K), word_VD, chunk=256)
            table_KD = rotate(word_VD[nearest_K], stage_K)
            table_KD = table_KD if g else readout.mark(table_KD, length_K)
        tables.append(table_KD)
    return tables


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
            tables = word_codes(model, ids_NT, seed)
            figures = start_from_states(writer.codes, writer.head, x_nD, seed, tables)
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
        logits_BSV = decompressor.logits(*decompressor.read(h_BSD, *covering))
        nll[weight] = float(cross_entropy(logits_BSV[:, :-1], ids_BT).mean())
    best = min(nll, key=nll.get)
    decompressor.gain.fill_(best * unit)
    return {"vote": best, "vote_nll": nll[best]}
