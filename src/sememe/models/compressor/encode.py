"""The compressor: a text → which of its tokens end a segment, and what each segment's code is to be
read from.

Suffixes as in `concepts`; S = 1 + T counts the BOS, which is segment 0 of each row: it carries
nothing and is not counted."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.sharding import whole
from sememe.concepts.dial import evaluating
from sememe.concepts.segments import Chunk, Packing, packing
from sememe.concepts.writer import WriteDecision
from sememe.models.compressor.entries import run_entries
from sememe.models.compressor.slots import Slots

ADAPTER = "compressor"


def embed_text(model, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Chunk:
    """(B, T) texts with the BOS before them. Padding, where the mask is 0, is on the right."""
    ids_BS = F.pad(ids_BT, (1, 0), value=model.bos)
    mask_BS = None if attention_mask is None else F.pad(attention_mask, (1, 0), value=1)
    return Chunk.of(model.spine.embed(ids_BS), mask_BS, ids_BT=ids_BS)


def read_entries(model, x_BnD, position_BK, valid_BK, cache: DynamicCache | None = None) -> Tensor:
    """(B, n, D) states of new entries after the layers that the compressor reads with, normed: the
    last layers' are of any size."""
    last = model.config.depth or len(model.spine)
    h_BnD = run_entries(model.spine, last, x_BnD, position_BK, valid_BK, cache)
    return F.rms_norm(h_BnD.float(), h_BnD.shape[-1:])


def read_text(model, text: Chunk, cache: DynamicCache | None = None) -> Tensor:
    """(B, S, D) states of a text as the compressor reads it, causal."""
    with adapter(model.backbone, ADAPTER):
        return read_entries(model, text.embed_BTD, text.position_BT, text.valid_BT, cache)


def token_states(model, text: Chunk) -> Tensor:
    """(B, S, D) what the gate and the codes read: the states of the text, or its embeddings where
    neither asks for states: of codes the untrained ones, before a step has moved their map."""
    tokens = model.writer.readout.tokens
    codes_read = tokens is not None and (torch.is_grad_enabled() or tokens.context.any())
    return read_text(model, text) if model.gate_reads or codes_read else text.embed_BTD.float()


def decide(model, text: Chunk) -> tuple[WriteDecision, Slots | None]:
    """Segments that end where the gate says, or as long as the compressor chooses, in slots."""
    if model.segmenter is None:
        return model.writer.decide(token_states(model, text), text), None
    draws = model.training or model.generator is not None
    with adapter(model.backbone, ADAPTER):
        with evaluating(model), whole(model.backbone):
            h_BSD, slots = step_by_step(model, text, draws)
        if torch.is_grad_enabled():
            # Or weights cast above, without gradient, would serve this pass too (pytorch 112583).
            torch.clear_autocast_cache()
            h_BSD, slots.state_BCD = at_once(model, text, slots)
    last_BC = torch.where(slots.rest_BC > 0, slots.cursor_BC + slots.length_BC - 1, 0)
    # The BOS, segment 0, has no slot.
    written_BS = torch.zeros_like(text.valid_BT).scatter(1, F.pad(last_BC, (1, 0)), True)
    state_BCD = F.pad(slots.state_BCD, (0, 0, 1, 0))
    pack, h_BCD = segments(model, h_BSD, text, written_BS, state_BCD)
    coded_BC = pack.valid_BC & (pack.index_BC > 0)
    return WriteDecision(None, written_BS, pack, coded_BC, h_BCD, token_BCF=h_BCD), slots


def segments(
    model, h_BSD: Tensor, text: Chunk, written_BS: Tensor, state_BCD: Tensor
) -> tuple[Packing, Tensor]:
    """The packing and the (B, C, D) states of segments that were written from slots."""
    pack, writer = packing(written_BS), model.writer
    with torch.autocast(h_BSD.device.type, enabled=False):
        more_BCD = F.linear(state_BCD[:, : pack.index_BC.shape[1]], model.segmenter.more.float())
        return pack, writer.readout.states(
            h_BSD, text, pack, written_BS, text.valid_BT, writer.codes, more_BCD
        )


@torch.no_grad()
def step_by_step(model, text: Chunk, draws: bool) -> tuple[Tensor, Slots]:
    """(B, S, D) states of a text, and slot after slot, with a cache, until all of it is covered.
    Lengths are drawn, or the likeliest with which the dial's rate is held."""
    lengths, rate = model.segmenter.lengths, model.dial.rate
    cache = DynamicCache()
    h_BSD = read_text(model, text, cache)
    total_B = text.valid_BT.sum(1) - 1
    cursor_B = torch.ones_like(total_B)
    code_BD = torch.zeros_like(h_BSD[:, 0])
    position_BK, valid_BK = text.position_BT, text.valid_BT
    tilt = 0.0 if draws else lengths.tilt(rate)
    steps: list[tuple[Tensor, ...]] = []
    while bool((cursor_B <= total_B).any()) or not steps:
        x_B1D, position_B1 = model.segmenter.inputs(text, cursor_B[:, None], code_BD[:, None])
        position_BK = torch.cat([position_BK, position_B1], 1)
        valid_BK = F.pad(valid_BK, (0, 1), value=True)
        h_B1D = read_entries(model, x_B1D, position_BK, valid_BK, cache)
        state_BD = F.normalize(h_B1D[:, 0], dim=-1)
        # A row that has ended goes on with segments of one token, which nobody reads.
        rest_B = (total_B + 1 - cursor_B).clamp(min=0)
        with torch.autocast(state_BD.device.type, enabled=False):
            log_p_BN = lengths(state_BD)
            if draws:
                length_B = lengths.draw(log_p_BN, rest_B, model.generator)
            else:
                length_B = lengths.choose(log_p_BN, rest_B, total_B, len(steps), rate, tilt)
            steps.append((cursor_B, rest_B, length_B, code_BD, state_BD))
            code_BD = segment_code(model, text, h_BSD, cursor_B, length_B, state_BD)
        cursor_B = cursor_B + length_B
    return h_BSD, Slots(*(torch.stack(x, 1) for x in zip(*steps, strict=True)))


def segment_code(model, text: Chunk, h_BSD, first_B, length_B, state_BD) -> Tensor:
    """(B, D) what the decompressor would read of one segment of each row, normalised."""
    offset_N = torch.arange(model.config.max_tail + 1, device=h_BSD.device)
    index_BN = (first_B[:, None] + offset_N).clamp(max=h_BSD.shape[1] - 1)
    part = replace(
        text,
        ids_BT=text.ids_BT.gather(1, index_BN),
        embed_BTD=text.embed_BTD.take_along_dim(index_BN.unsqueeze(-1), 1),
        valid_BT=offset_N < length_B[:, None],
    )
    h_BND = h_BSD.take_along_dim(index_BN.unsqueeze(-1), 1)
    written_BN = offset_N == length_B[:, None] - 1
    _, h_B1D = segments(model, h_BND, part, written_BN, state_BD[:, None])
    x_BD = model.writer.codes.normalise(h_B1D[:, 0])
    hard_BD = model.writer.quantise(x_BD, soft=False).hard_nD
    return x_BD.lerp(hard_BD, model.dial.quantise)


def at_once(model, text: Chunk, slots: Slots) -> tuple[Tensor, Tensor]:
    """(B, S, D) states of the text and (B, C, D) states of its slots, given their codes: one
    forward, with gradient."""
    x_BCD, position_BC = model.segmenter.inputs(text, slots.cursor_BC, slots.code_BCD)
    h_BKD = read_entries(
        model,
        torch.cat([text.embed_BTD, x_BCD], 1),
        torch.cat([text.position_BT, position_BC], 1),
        torch.cat([text.valid_BT, slots.rest_BC > 0], 1),
    )
    h_BSD, h_BCD = h_BKD.split([text.ids_BT.shape[1], x_BCD.shape[1]], 1)
    return h_BSD, F.normalize(h_BCD, dim=-1)
