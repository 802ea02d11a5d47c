"""The compressor: a text → segments, and what the code of each is to be read from.

Suffixes as in `concepts`; S = 1 + T counts the BOS, which is segment 0 of each row: it carries
nothing and is not counted. x are normalised concept states."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.split import Rope, Spine
from sememe.concepts.codebook import ConceptEmbedding
from sememe.concepts.news import rotate
from sememe.concepts.segments import Packing, packing
from sememe.concepts.writer import WriteDecision
from sememe.models.compressor.entries import run_entries
from sememe.models.compressor.slots import Slots, Text

ADAPTER = "compressor"


@dataclass
class Segments:
    """Which tokens end a segment, and what their codes are to be read from."""

    written_BS: Tensor
    pack: Packing
    x_BCD: Tensor | None = None
    score_BS: Tensor | None = None
    threshold: float = 0.0
    """The gate's, where a gate has decided."""
    slots: Slots | None = None
    """Where lengths were chosen instead."""

    @property
    def coded_BC(self) -> Tensor:
        """Which concepts are real, and not the BOS."""
        return self.pack.valid_BC & (self.pack.index_BC > 0)

    def decision(self, codes: ConceptEmbedding) -> WriteDecision:
        """As the writer takes it."""
        return WriteDecision(
            written=None,
            written_BT=self.written_BS,
            pack=self.pack,
            coded_BC=self.coded_BC,
            h_BCD=codes.to_states(self.x_BCD),
            token_BCF=self.x_BCD,
            score_BT=self.score_BS,
            threshold=self.threshold,
        )

    @property
    def length_BC(self) -> Tensor:
        """Tokens of each segment, the one that ends it among them."""
        first_B1 = torch.full_like(self.pack.index_BC[:, :1], -1)
        return self.pack.index_BC.diff(dim=1, prepend=first_B1)

    @property
    def rank_BS(self) -> Tensor:
        """Which segment each token is in; some segment on padding."""
        rank_BS = self.written_BS.cumsum(1) - self.written_BS.long()
        return rank_BS.clamp(max=self.pack.index_BC.shape[1] - 1)

    @property
    def offset_BS(self) -> Tensor:
        """Positions of tokens in their segments, from 0."""
        at_S = torch.arange(self.written_BS.shape[1], device=self.written_BS.device)
        last_BS = torch.where(self.written_BS, at_S, 0).cummax(1).values
        return F.pad((at_S - last_BS)[:, :-1], (1, 0))


def embed_text(model, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Text:
    """(B, T) texts with the BOS before them. Padding, where the mask is 0, is on the right."""
    spine = Spine(model.backbone)
    ids_BS = F.pad(ids_BT, (1, 0), value=model.bos)
    valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    if attention_mask is not None:
        valid_BS = F.pad(attention_mask, (1, 0), value=1).bool().to(ids_BS.device)
    embed_BSD = spine.embed(ids_BS)
    position_BS = (valid_BS.cumsum(1) - 1).clamp(min=0)
    return Text(ids_BS, embed_BSD, position_BS, valid_BS, spine.rope(embed_BSD, position_BS))


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


def read_text(model, text: Text, cache: DynamicCache | None = None) -> Tensor:
    """(B, S, D) states of a text as the compressor reads it, causal."""
    with adapter(model.backbone, ADAPTER):
        return read_entries(
            model, text.embed_BSD, text.position_BS, text.valid_BS, text.rope, cache
        )


def news(model, text: Text, h_BSD: Tensor | None = None) -> Tensor:
    """(B, S, D) what each token adds to what those before it predict, by the states `h_BSD`, or
    those that the compressor reads."""
    if not model.reads_states:
        return text.embed_BSD.float()
    h_BSD = read_text(model, text) if h_BSD is None else h_BSD
    return model.next_embedding.news(text.embed_BSD, h_BSD)


def contributions(model, news: Tensor, ids: Tensor, offset: Tensor, length: Tensor) -> Tensor:
    """(…, D) what tokens add to the states of their segments: news, rotated by their offsets, or
    the vectors of their bins."""
    bins = model.decompressor.bins
    if bins is None:
        return rotate(news, offset)
    return model.writer.codes.scale.float() * bins(ids, offset, length)


def scores(model, news_BSD: Tensor) -> Tensor:
    """(B, S) the boundary's: the higher, the sooner a segment ends."""
    x_BSD = model.writer.codes.normalise(news_BSD)
    with torch.autocast(x_BSD.device.type, enabled=False):
        before_BSD = torch.cat([x_BSD[:, :1], x_BSD[:, :-1]], 1)
        return model.writer.gate.boundary.score(model.writer.head, x_BSD, before_BSD)


def segment(model, text: Text) -> Segments:
    """Segments that end where the gate says, or as long as the compressor chooses."""
    if model.segmenter is not None:
        return segment_by_slots(model, text)
    gate, valid_BS = model.writer.gate, text.valid_BS
    news_BSD = news(model, text)
    score_BS = scores(model, news_BSD)
    real_BS = valid_BS.cpu().numpy()
    rate, max_tail = model.dial.rate, model.config.max_tail
    written_BS, _, threshold = gate(score_BS, real_BS, rate=rate, max_tail=max_tail)
    written_BS = torch.from_numpy(written_BS).to(valid_BS.device)
    # The last token ends a segment: all of the text is covered.
    written_BS |= valid_BS & (valid_BS.flip(1).cumsum(1).flip(1) == 1)
    if model.training and torch.is_grad_enabled():
        gate.track(score_BS[valid_BS & (text.position_BS > 0)])
    weight_BS = valid_BS
    if gate.boundary.accumulates and model.decompressor.bins is None:
        weight_BS = valid_BS * score_BS
    segments = Segments(written_BS, packing(written_BS), None, score_BS, threshold)
    segments.x_BCD = sums(model, text, segments, news_BSD, weight_BS)
    return segments


def segment_by_slots(model, text: Text) -> Segments:
    """Segments whose lengths the compressor chooses one after another, having read all of the
    text."""
    segmenter, learns = model.segmenter, torch.is_grad_enabled()
    draw = (model.training and learns) or segmenter.generator is not None
    read = functools.partial(read_entries, model)
    with adapter(model.backbone, ADAPTER):
        was_training = model.training
        model.eval()
        with torch.no_grad():
            cache = DynamicCache()
            news_BSD = news(model, text, read_text(model, text, cache))
            code_of = functools.partial(code_of_span, model, text, news_BSD)
            slots = segmenter.step_by_step(read, code_of, text, cache, model.dial.rate, draw)
        model.train(was_training)
        if learns:
            # Or weights cast above, without gradient, would serve this pass too (pytorch 112583).
            torch.clear_autocast_cache()
            h_BSD, slots.state_BCD = segmenter.at_once(read, text, slots)
            news_BSD = news(model, text, h_BSD)
    last_BC = torch.where(slots.rest_BC > 0, slots.cursor_BC + slots.length_BC - 1, 0)
    written_BS = torch.zeros_like(text.valid_BS).scatter(1, F.pad(last_BC, (1, 0)), True)
    segments = Segments(written_BS, packing(written_BS), slots=slots)
    segments.x_BCD = sums(model, text, segments, news_BSD, text.valid_BS)
    return segments


def code_of_span(
    model, text: Text, news_BSD: Tensor, first_B: Tensor, length_B: Tensor, state_BD: Tensor
) -> Tensor:
    """(B, D) what the decompressor would read, normalised, of one segment of each row."""
    row_B1 = torch.arange(len(first_B), device=first_B.device).unsqueeze(1)
    offset_N = torch.arange(model.config.max_tail + 1, device=first_B.device)
    at_BN = text.inside(first_B.unsqueeze(1) + offset_N)
    length_B1 = length_B.unsqueeze(1)
    part_BND = contributions(
        model, news_BSD[row_B1, at_BN], text.ids_BS[row_B1, at_BN], offset_N, length_B1
    )
    h_BD = (part_BND * (offset_N < length_B1).unsqueeze(-1)).sum(1)
    x_BD = model.writer.codes.normalise(h_BD) + model.segmenter.addition(state_BD)
    x_BD = model.decompressor.reader.mark(x_BD, length_B)
    share = model.dial.quantise
    if share == 0:
        return x_BD
    return x_BD + share * (model.writer.quantise(x_BD, soft=False).hard_nD - x_BD)


def sums(model, text: Text, segments: Segments, news_BSD: Tensor, weight_BS: Tensor) -> Tensor:
    """(B, C, D) what the tokens of each segment add up to (weighted, n times their mean), and its
    slot adds, with the mark of its length."""
    length_BC = segments.length_BC
    with torch.autocast(news_BSD.device.type, enabled=False):
        length_BS = length_BC.gather(1, segments.rank_BS)
        part_BSD = contributions(model, news_BSD, text.ids_BS, segments.offset_BS, length_BS)
        mean_BCD, _ = segments.pack.pool(part_BSD, weight_BS, segments.written_BS)
        x_BCD = model.writer.codes.normalise(mean_BCD * length_BC.unsqueeze(-1))
        if segments.slots is not None:
            more_BCD = model.segmenter.addition(segments.slots.state_BCD)
            # The BOS, segment 0, has no slot.
            x_BCD = x_BCD + F.pad(more_BCD, (0, 0, 1, 0))[:, : x_BCD.shape[1]]
        return model.decompressor.reader.mark(x_BCD, length_BC)
