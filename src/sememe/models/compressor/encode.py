"""The compressor: a text → which of its tokens end a segment, and what each segment's code is to be
read from.

Suffixes as in `concepts`; S = 1 + T counts the BOS, which is segment 0 of each row: it carries
nothing and is not counted."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.split import Rope, Spine
from sememe.concepts.segments import Chunk, packing
from sememe.concepts.writer import WriteDecision
from sememe.models.compressor.entries import run_entries
from sememe.models.compressor.slots import Slots

ADAPTER = "compressor"


def embed_text(model, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Chunk:
    """(B, T) texts with the BOS before them. Padding, where the mask is 0, is on the right."""
    spine = Spine(model.backbone)
    ids_BS = F.pad(ids_BT, (1, 0), value=model.bos)
    mask_BS = None if attention_mask is None else F.pad(attention_mask, (1, 0), value=1)
    text = Chunk.of(spine.embed(ids_BS), mask_BS, ids_BT=ids_BS)
    text.rope = spine.rope(text.embed_BTD, text.position_BT)
    return text


def read_entries(
    model,
    x_BnD: Tensor,
    position_BK: Tensor,
    valid_BK: Tensor,
    rope: Rope,
    cache: DynamicCache | None = None,
) -> Tensor:
    """(B, n, D) states of new entries after the layers that the compressor reads with, normed: the
    last layers' are of any size."""
    spine = Spine(model.backbone)
    last = model.config.depth or len(spine)
    h_BnD = run_entries(spine, last, x_BnD, position_BK, valid_BK, rope, cache)
    return F.rms_norm(h_BnD.float(), h_BnD.shape[-1:])


def read_text(model, text: Chunk, cache: DynamicCache | None = None) -> Tensor:
    """(B, S, D) states of a text as the compressor reads it, causal."""
    with adapter(model.backbone, ADAPTER):
        return read_entries(
            model, text.embed_BTD, text.position_BT, text.valid_BT, text.rope, cache
        )


def news(model, text: Chunk) -> Tensor:
    """(B, S, D) what each token adds to what those before it predict."""
    if not model.reads_states:
        return text.embed_BTD.float()
    return model.next_embedding.news(text.embed_BTD, read_text(model, text))


def decide(model, text: Chunk) -> tuple[WriteDecision, Slots | None]:
    """Segments that end where the gate says, or as long as the compressor chooses, in slots."""
    if model.segmenter is None:
        return model.writer.decide(news(model, text), text), None
    learns = torch.is_grad_enabled()
    with adapter(model.backbone, ADAPTER):
        news_BSD, slots = step_by_step(model, text, learns)
        if learns:
            # Or weights cast above, without gradient, would serve this pass too (pytorch 112583).
            torch.clear_autocast_cache()
            states_of = functools.partial(read_entries, model)
            h_BSD, slots.state_BCD = model.segmenter.at_once(states_of, text, slots)
            news_BSD = model.next_embedding.news(text.embed_BTD, h_BSD)
    last_BC = torch.where(slots.rest_BC > 0, slots.cursor_BC + slots.length_BC - 1, 0)
    # The BOS, segment 0, has no slot.
    written_BS = torch.zeros_like(text.valid_BT).scatter(1, F.pad(last_BC, (1, 0)), True)
    pack = packing(written_BS)
    with torch.autocast(news_BSD.device.type, enabled=False):
        more_BCD = F.pad(model.segmenter.addition(slots.state_BCD), (0, 0, 1, 0))
        more_BCD = more_BCD[:, : pack.index_BC.shape[1]]
    h_BCD = model.writer.readout.states(
        news_BSD, text, pack, written_BS, text.valid_BT, model.writer.codes, more_BCD
    )
    coded_BC = pack.valid_BC & (pack.index_BC > 0)
    return WriteDecision(None, written_BS, pack, coded_BC, h_BCD, token_BCF=h_BCD), slots


@torch.no_grad()
def step_by_step(model, text: Chunk, learns: bool) -> tuple[Tensor, Slots]:
    """(B, S, D) news of a text, and its slots one after another, with a cache and no dropout."""
    writer, segmenter = model.writer, model.segmenter
    draw = (model.training and learns) or segmenter.generator is not None
    was_training = model.training
    model.eval()
    cache = DynamicCache()
    news_BSD = model.next_embedding.news(text.embed_BTD, read_text(model, text, cache))
    row_B1 = torch.arange(len(news_BSD), device=news_BSD.device).unsqueeze(1)
    offset_N = torch.arange(model.config.max_tail + 1, device=news_BSD.device)

    def code_of(first_B: Tensor, length_B: Tensor, state_BD: Tensor) -> Tensor:
        """(B, D) what the decompressor would read of one segment of each row, normalised."""
        at_BN = (first_B.unsqueeze(1) + offset_N).clamp(max=news_BSD.shape[1] - 1)
        length_B1 = length_B.unsqueeze(1)
        part_BND = writer.readout.parts(
            news_BSD[row_B1, at_BN], text.ids_BT[row_B1, at_BN], offset_N, length_B1, writer.codes
        )
        total_BD = (part_BND * (offset_N < length_B1).unsqueeze(-1)).sum(1)
        more_BD = segmenter.addition(state_BD)
        h_BD = writer.readout.finish(total_BD, length_B, writer.codes, more_BD)
        x_BD, share = writer.codes.normalise(h_BD), model.dial.quantise
        return x_BD if share == 0 else x_BD.lerp(writer.quantise(x_BD, soft=False).hard_nD, share)

    states_of = functools.partial(read_entries, model)
    slots = segmenter.step_by_step(states_of, code_of, text, cache, model.dial.rate, draw)
    model.train(was_training)
    return news_BSD, slots
