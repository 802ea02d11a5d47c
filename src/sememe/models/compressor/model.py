"""Compressor and decompressor: (B, T) ids → concept ids → the text again, (B, T, V) logits
(docs/compressor.md).

    BOS x ─ base + adapter "compressor" ─ h ─ gate and head ─ z ─ code ─ e ┐
    BOS x ─ embed ─ (+) ── e of the segment that the next token lies in ───┘
                     └─ base + adapter "decompressor" ─ p(x_t)

One frozen base, two adapters. The compressor sees the text; the decompressor its own words and the
concepts alone. How many tokens a concept stands for it says itself, so that the decompressor knows
when the next one is due. To go on from a text instead of writing it, the concepts come before the
new words, each at the position that the rate gives it. Suffixes as in `concepts`; S = 1 + T counts
the BOS."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.adapters import add_lora
from sememe.backbone.split import Spine
from sememe.concepts.bins import WordBins
from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.dial import Dial
from sememe.concepts.segment_sum import SegmentSum
from sememe.concepts.segments import Chunk, tail_lengths
from sememe.concepts.writer import NULL, ConceptWriter, WriteDecision
from sememe.errors import CheckpointError, CodesError
from sememe.models.adapted import AdaptedModel
from sememe.models.compressor import decode, encode, start
from sememe.models.compressor.decode import Decompressor
from sememe.models.compressor.encode import decide, embed_text
from sememe.models.compressor.slots import Segmenter, Slots
from sememe.models.configuration import CompressorConfig
from sememe.models.losses import cross_entropy, token_losses
from sememe.progress import bar

ROWS_AT_ONCE = 16  # that are compressed together
# Beams of all rows that are written together, each with a cache of its own.
BEAMS_AT_ONCE = 256


@dataclass
class CompressorOutput(CausalLMOutputWithPast):
    """`concept_ids` (B, T): the id that each token wrote; NULL -1."""

    concept_ids: Tensor | None = None


@dataclass
class Encoded:
    """What the compressor makes of (B, T) texts, each with its BOS. Its concepts are (B, C); the
    BOS is the first of each row and not coded."""

    text: Chunk
    decision: WriteDecision
    slots: Slots | None
    e_BCD: Tensor
    ids_BC: Tensor

    @property
    def coded_BC(self) -> Tensor:
        """Which concepts are real."""
        return self.decision.coded_BC

    @property
    def rank_BS(self) -> Tensor:
        """Which concept covers each next token; some concept where there is none."""
        return self.decision.written_BT.cumsum(1).clamp(max=self.e_BCD.shape[1] - 1)

    @property
    def offset_BS(self) -> Tensor:
        """Positions of the next tokens in their segments, from 0; 0 where there is none."""
        return tail_lengths(self.decision.written_BT, self.text.valid_BT)


class CompressorForCausalLM(AdaptedModel):
    """The base with two adapters, and gate, head and codes between them."""

    config_class = CompressorConfig
    foldable = False

    def __init__(self, config: CompressorConfig, backbone=None):
        super().__init__(config, backbone)
        config.check()
        width, lengths = config.text_config.hidden_size, config.max_tail + 1
        self.spine = Spine(self.backbone)
        self.dial = Dial(config.rate, config.quantise)
        self.generator: torch.Generator | None = None
        """Where there is one, lengths are drawn with it even when the model is not trained."""
        boundary = BOUNDARIES[config.boundary]
        bins = None
        if config.content == "bins":
            vocab = len(self.get_output_embeddings().weight)
            bins = WordBins(config, width, vocab, even=not boundary.scored)
        segments = SegmentSum(width, lengths, bins, weighted=boundary.accumulates)
        self.writer = ConceptWriter(config, width, self.dial, segments, closes_last=True)
        self.segmenter = Segmenter(width, lengths, config.rate) if boundary.offline else None
        self.decompressor = Decompressor(self.spine, width, lengths, segments)
        self.gate_reads = boundary.scored or boundary.offline
        self.finish()

    def add_adapters(self) -> None:
        # Bins of segments with fixed ends do not depend on the base's states.
        if self.gate_reads or self.writer.readout.tokens is not None:
            add_lora(self.backbone, self.config, encode.ADAPTER, self.config.depth)
        add_lora(self.backbone, self.config, decode.ADAPTER)

    # ---- the compressor ----

    def encode(
        self, ids_BT: Tensor, attention_mask: Tensor | None = None, ablation: str | None = None
    ) -> Encoded:
        """The concepts of (B, T) texts."""
        text = embed_text(self, ids_BT, attention_mask)
        decision, slots = decide(self, text)
        e_BCD, ids_BC = self.writer.write(decision, ablation)
        if self.training and self.writer.gate.boundary.learned:
            # The gate learns what the code is worth beside none.
            e_BCD = self.writer.confidence(e_BCD, self.writer.codes.mean, decision)
        return Encoded(text, decision, slots, e_BCD, ids_BC)

    @torch.no_grad()
    def compress(self, ids_BT: Tensor) -> list[list[int]]:
        """The concept ids of each row, each below K^G."""
        concepts = []
        for part_BT in batches("compress", ids_BT.split(ROWS_AT_ONCE)):
            encoded = self.encode(part_BT.to(self.device))
            rows = zip(encoded.ids_BC, encoded.coded_BC, strict=True)
            concepts += [ids_C[coded_C].tolist() for ids_C, coded_C in rows]
        return concepts

    # ---- both halves ----

    def covering(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """(B, S, D) normalised states of the concepts that cover each next token, and (B, S) its
        offset in its segment; the last of each row is of no token."""
        e_BSD = encoded.e_BCD.take_along_dim(encoded.rank_BS.unsqueeze(-1), 1)
        return self.writer.codes.normalise(e_BSD), encoded.offset_BS

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        ablation: str | None = None,
        **kwargs,
    ) -> CompressorOutput:
        """The text through its concepts. `loss`: of writing it again, every token, mixed with going
        on from its first half.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 0 on padding, on the right.
            labels: (B, T) targets, -100 ignored; None for no loss.
            ablation: replace the codes, see `concepts/ablation.py`.

        Returns logits (B, T, V) as a language model's: those at t are of token t + 1; none of a
        training step."""
        self.refuse_unknown(kwargs)
        encoded = self.encode(input_ids, attention_mask, ablation)
        covering = self.covering(encoded)
        h_BSD = self.decompressor.states(encoded.text, *covering)
        read = self.decompressor.read(h_BSD, *covering)
        steps = labels is not None and self.training
        logits_BSV = None if steps else self.decompressor.logits(*read)
        valid_BC = encoded.decision.pack.valid_BC
        ids_BS = torch.full_like(encoded.text.ids_BT, NULL).masked_scatter(
            encoded.decision.written_BT, encoded.ids_BC[valid_BC]
        )
        loss = None
        if labels is not None:
            labels = labels.masked_fill(~encoded.text.valid_BT[:, 1:], -100)
            if steps:
                head, states = self.get_output_embeddings(), (x[:, :-1] for x in read)
                nll_BT = token_losses(head, labels, *states, score=self.decompressor.logits)
            else:
                nll_BT = cross_entropy(logits_BSV[:, :-1], labels)
            loss = self._loss(encoded, labels, nll_BT)
            if (total := kwargs.get("num_items_in_batch")) is not None:
                # This batch's tokens are a share of the step's.
                loss = loss * (labels != -100).sum() / total
        logits_BTV = None if steps else logits_BSV[:, 1:]
        return CompressorOutput(loss=loss, logits=logits_BTV, concept_ids=ids_BS[:, 1:])

    def _loss(self, encoded: Encoded, labels_BT: Tensor, nll_BT: Tensor) -> Tensor:
        """Nats per token of the text, with what lengths add to them in training."""
        share = self.config.continuation_share
        loss = (1 - share) * mean_nll(nll_BT, labels_BT)
        if share > 0:
            half = labels_BT.shape[1] // 2
            first_BT, second_BT = encoded.text.ids_BT[:, 1:].tensor_split([half], 1)
            h_BhD = self.continuation_states(self.encode(first_BT), second_BT)
            nll_Bh = token_losses(self.get_output_embeddings(), labels_BT[:, half:], h_BhD)
            loss = loss + share * mean_nll(nll_Bh, labels_BT[:, half:])
        if not self.training:
            return loss
        if self.segmenter is not None:
            rank_BT = encoded.rank_BS[:, :-1]
            loss = loss + self.segmenter.length_loss(encoded.slots, rank_BT, nll_BT, self.dial.rate)
        # Keeps every rank's gradients in step, whatever its batch used.
        return loss + sum(p.float().sum() for p in self.parameters() if p.requires_grad) * 0.0

    # ---- the decompressor ----

    @torch.no_grad()
    def decompress(self, concepts: list[list[int]], beams: int | None = None) -> list[list[int]]:
        """The token ids of the likeliest text of each row of concept ids that a search with so many
        beams finds (None: as configured). A row without concepts is an empty text.

        Raises CheckpointError for an id that this model has no code for."""
        count = self.config.num_concepts**self.config.codes_per_concept
        wrong = [i for ids in concepts for i in ids if not 0 <= i < count]
        if wrong:
            raise CheckpointError(
                f"concept id {wrong[0]}: need ids from 0 to {count - 1}, as this model writes "
                "them. try: the model that compressed the text"
            )
        beams = beams or self.config.beams
        # The empty row is for no rows at all.
        rows = [torch.tensor(ids, dtype=torch.long) for ids in (*concepts, [])]
        ids_NC = pad_sequence(rows, batch_first=True, padding_value=-1)[:-1]
        # Rows of about one length go together.
        order_N = (ids_NC >= 0).sum(1).argsort()
        texts = []
        for part_B in batches("decompress", order_N.split(max(1, BEAMS_AT_ONCE // beams))):
            ids_BC = ids_NC[part_B].to(self.device)
            x_BCD = self.writer.codes.normalise(self.writer.codes(ids_BC.clamp(min=0)))
            texts += self.decompressor.write(x_BCD, ids_BC >= 0, self.bos, beams)
        return [texts[n] for n in order_N.argsort()]

    @torch.no_grad()
    def length(self, concepts: Sequence[int]) -> int:
        """Tokens of the text that a row of concept ids stands for, as the codes say."""
        ids_1C = torch.tensor([concepts], dtype=torch.long, device=self.device)
        x_1CD = self.writer.codes.normalise(self.writer.codes(ids_1C))
        return int(self.decompressor.segments.length(x_1CD).sum())

    def lengths(self, rows: list[list[int]]) -> list[int]:
        """That of each row. Raises CodesError where one has more tokens than the base has positions
        for, after the BOS."""
        lengths = [self.length(ids) for ids in rows]
        longest = self.config.text_config.max_position_embeddings - 1
        if max(lengths, default=0) > longest:
            raise CodesError(
                f"the codes of a window stand for more than {longest} tokens: need those of "
                "one text that the model has read. try: the codes as they were written"
            )
        return lengths

    def continuation_logits(self, encoded: Encoded, ids_BT: Tensor) -> Tensor:
        """(B, T, V) logits of each of the (B, T) tokens, given those before it and the codes of
        what came before them."""
        return self.get_output_embeddings()(self.continuation_states(encoded, ids_BT))

    def continuation_states(self, encoded: Encoded, ids_BT: Tensor) -> Tensor:
        """(B, T, D) normed states of those logits."""
        codes = self.writer.codes
        # Without the BOS, concept 0.
        ids_BC, x_BC1D = encoded.ids_BC[:, 1:], codes.normalise(encoded.e_BCD[:, 1:, None])
        # The codes themselves, with the gradient that their sum has as well; not coded yet, a
        # concept's state stands for each.
        x_BCGD = codes.by_stage(ids_BC.clamp(min=0)) + (x_BC1D - x_BC1D.detach())
        x_BCGD = torch.where((ids_BC < 0)[..., None, None], x_BC1D, x_BCGD)
        return self.decompressor.continuation_states(
            F.pad(ids_BT, (1, 0), value=self.bos), x_BCGD, encoded.coded_BC[:, 1:], self.dial.rate
        )

    # ---- before training: see start.py ----

    start_frame = start.start_frame
    start_codes = start.start_codes
    calibrate_gate = start.calibrate_gate
    written_inputs = start.segment_states


def batches(name: str, parts: Sequence) -> Iterable:
    """Them, with a bar where there are several."""
    return bar(iterable=parts, desc=name, unit="batch", leave=False, disable=len(parts) < 2)


def mean_nll(nll_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Nats per token that has a label."""
    return nll_BT.sum() / (labels_BT != -100).sum().clamp(min=1)
