"""The forward pass of each system with shapes that depend on no number: what an online model would
write, it takes to be as many concepts in each text as its rate says."""

import numpy as np
import torch
from torch import Tensor

from sememe.backbone.split import split_rope
from sememe.backbone.tails import TailKeys
from sememe.concepts.segments import Chunk, Packing
from sememe.concepts.writer import WriteDecision
from sememe.models.losses import loss_and_logits


def plain_loss(model, ids_BT: Tensor) -> Tensor:
    """Of a system whose shapes depend on no number anyway."""
    return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss


def online_loss(model, ids_BT: Tensor) -> Tensor:
    """As `OnlineForCausalLM.forward` at the dial's rate, all codes in use, which
    tests/test_scaling.py holds it to."""
    spine, writer = model.spine, model.writer
    batch, length = ids_BT.shape
    position_BT = torch.arange(length).expand(batch, length)
    chunk = Chunk(model.embed(ids_BT), position_BT, torch.ones(batch, length).bool(), None)
    chunk.rope = spine.rope(chunk.embed_BTD, position_BT)
    shallow, middle, _ = model.config.split
    window = model.config.shallow_window
    causal = None if window is None else _mask(batch, length, length)
    h_BTD = spine.run(0, shallow, chunk.embed_BTD, position_BT, chunk.rope, lambda _: causal)
    decision = _decision(writer, h_BTD, chunk)
    e_BCD = _written(writer, decision)
    c_BCD = _middle(model, e_BCD, h_BTD)
    last_BD = model.bridge.first(writer.memory(batch).last_BD)
    both = writer.gate.boundary.learned
    tail_BTD, _ = model.bridge.tails(h_BTD, c_BCD, decision, last_BD, everywhere=both)
    c_BCD = model._teach_gate(c_BCD, tail_BTD, decision)
    x_BTD = decision.pack.unpack(c_BCD, tail_BTD)
    masks = _mask(batch, length, length)
    first, last = shallow + middle, len(spine)
    d_BTD = spine.run(first, last, x_BTD, position_BT, chunk.rope, lambda _: masks)
    loss, _ = loss_and_logits(model, spine.decoder.norm(d_BTD), ids_BT)
    return loss


def _mask(batch: int, queries: int, keys: int) -> Tensor:
    return torch.ones(batch, 1, queries, keys).bool()


def _decision(writer, h_BTD: Tensor, chunk: Chunk) -> WriteDecision:
    batch, length = chunk.position_BT.shape
    count = min(length, max(1, round(length * writer.dial.rate)))
    memory = writer.memory(batch)
    score_BT = writer.scores(torch.cat([memory.last_BD.unsqueeze(1), h_BTD], 1))
    index_BC = torch.zeros(batch, count, dtype=torch.long)
    written_BT = chunk.valid_BT
    pack = Packing(index_BC, index_BC == 0, torch.zeros_like(chunk.position_BT), written_BT)
    h_BCD, token_BCF, _ = writer.readout(
        h_BTD, chunk, pack, written_BT, score_BT, memory.open_segment, writer.codes
    )
    valid_BC = pack.valid_BC
    written = np.tile(np.arange(length) < count, (batch, 1))
    return WriteDecision(written, written_BT, pack, valid_BC, h_BCD, token_BCF, score_BT)


def _written(writer, decision: WriteDecision) -> Tensor:
    """(B, C, D) states of the concepts."""
    h_BCD, token_BCF = decision.h_BCD, decision.token_BCF
    with torch.autocast(h_BCD.device.type, enabled=False):
        anchor_nD = writer.readout.anchor(token_BCF.flatten(0, 1))
        x_nD = writer.codes.normalise(h_BCD.flatten(0, 1)) - anchor_nD
        quantised = writer.quantise(x_nD, True, writer.config.gumbel)
        e_nD = writer.codes.to_states(quantised.state_nD + anchor_nD).to(h_BCD.dtype)
    return h_BCD.masked_scatter(decision.coded_BC.unsqueeze(-1), e_nD)


def _middle(model, e_BCD: Tensor, h_BTD: Tensor) -> Tensor:
    spine, (shallow, middle, _) = model.spine, model.config.split
    (batch, count), length = e_BCD.shape[:2], h_BTD.shape[1]
    tails = (length - count) * (model.config.segment == "both")
    position_Bn = torch.arange(count + tails).expand(batch, -1)
    rope, tail_rope = split_rope(spine.rope(e_BCD, position_Bn), count)
    cache, mask = None, None
    if tails:
        cache = TailKeys(None, model._tail_keys(h_BTD[:, :tails].clone(), tail_rope))
        mask = _mask(batch, count, count + tails)
    position_BC = position_Bn[:, :count]
    return spine.run(shallow, shallow + middle, e_BCD, position_BC, rope, lambda _: mask, cache)
