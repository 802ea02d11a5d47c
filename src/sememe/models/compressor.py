"""Compressor and decompressor: (B, T) ids → concept ids → the text again, (B, T, V) logits
(docs/concepts.md).

    BOS x ─ base + adapter "compressor" ─ h ─ gate and head ─ z ─ code ─ e ┐
    BOS x ─ embed ─ (+) ── e of the segment that the next token lies in ───┘─ base + adapter "decompressor" ─ p(x_t)

One frozen base, two adapters. The compressor sees the text; the decompressor its own words and the
concepts alone. How many tokens a concept stands for it says itself, so that the next one is read
when it is its turn. To go on from a text instead of writing it, the concepts stand ahead of the new
words, each at the place that the rate gives it. Suffixes as in `concepts`; S = 1 + T counts the
BOS."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.adapters import adapter, add_lora
from sememe.backbone.split import Rope, Spine
from sememe.concepts.bins import Confusion, WordBins
from sememe.concepts.codebook import SHARPNESS, ConceptEmbedding
from sememe.concepts.dial import Dial
from sememe.concepts.fit import linear_fit
from sememe.concepts.gate import RateGate
from sememe.concepts.head import HEADS
from sememe.concepts.news import Foretold, turn
from sememe.concepts.reader import SegmentReader
from sememe.errors import CheckpointError
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import CompressorConfig
from sememe.models.decompressing import DECOMPRESSOR, Decompressing, Encoded, places
from sememe.models.segmenting import Segmenter, Segmenting
from sememe.models.starting import Starting
from sememe.models.writing import NULL, Step, Writing, all_concepts

COMPRESSOR = "compressor"
VOTES = (
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
    64.0,
)  # logits that the mean word's own news may give it, at the start


@dataclass
class CompressorOutput(CausalLMOutputWithPast):
    """`concept_ids` (B, T): the id that each token wrote; NULL -1. `term`: what the lengths
    added to `loss`."""

    concept_ids: Tensor | None = None
    term: Tensor | None = None


class CompressorForCausalLM(Segmenting, Starting, Writing, Decompressing, AdaptedModel):
    """The base with two adapters, and a head, codes and gate between them."""

    config_class = CompressorConfig
    supports_gradient_checkpointing = (
        False  # recomputed layers would meet whichever adapter is on by then
    )
    closes_last = True
    bridge = anchor = pool = None
    foldable = False

    def __init__(self, config: CompressorConfig, backbone=None):
        super().__init__(config, backbone)
        config.check()
        width, lengths = config.text_config.hidden_size, config.max_tail + 1
        self.dial = Dial(config.rate, config.quantise)
        self.head = HEADS[config.head](width, config.num_concepts, config.codes_per_concept)
        self.codes = ConceptEmbedding(config.num_concepts, width, config.codes_per_concept)
        self.gate = RateGate(config.boundary, width)
        self.foretold = Foretold(width)
        self.reader = SegmentReader(width, lengths)
        self.bins = (
            None
            if config.content == "news"
            else WordBins(
                width,
                len(self.get_output_embeddings().weight),
                config.num_concepts,
                config.codes_per_concept,
                lengths,
                config.bins_rate,
                even=not self.gate.boundary.scored,
            )
        )
        self.segmenter = (
            Segmenter(width, lengths, config.rate) if self.gate.boundary.offline else None
        )
        self.finish()

    def add_adapters(self) -> None:
        config = self.config
        for name, last in ((COMPRESSOR, config.depth), (DECOMPRESSOR, None))[
            0 if self.reads else 1 :
        ]:
            add_lora(
                self.backbone,
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                config.lora_first,
                last,
                name,
            )

    @property
    def reads(self) -> bool:
        """Whether the compressor asks the base about a text at all: not where codes spell bins of
        segments with fixed ends."""
        boundary = self.gate.boundary
        return self.config.content == "news" or boundary.scored or boundary.offline

    def merged(self):
        """Raises CheckpointError: two adapters cannot be folded into one base."""
        raise CheckpointError(
            "a compressor's two adapters cannot be folded into one base: need it as it was saved. "
            "try: sememe compress and decompress on the run itself"
        )

    # ---- the compressor ----

    def opened(self, ids_BT: Tensor) -> Tensor:
        """(B, 1 + T): with the BOS ahead."""
        return torch.cat([torch.full_like(ids_BT[:, :1], self.bos), ids_BT], 1)

    def _shallow(self, spine: Spine, h_BSD: Tensor, step: Step) -> Tensor:
        """What each token says that the texts before it, read by the compressor, did not
        foretell."""
        if not self.reads:
            return h_BSD.float()
        return self._news(h_BSD, self._contextual(spine, h_BSD, step))

    def _news(self, embed_BSD: Tensor, seen_BSD: Tensor) -> Tensor:
        return embed_BSD.float() - F.pad(self.foretold(seen_BSD), (0, 0, 1, 0))[:, :-1]

    def _contextual(
        self, spine: Spine, h_BSD: Tensor, step: Step, cache: DynamicCache | None = None
    ) -> Tensor:
        """States of the text as the compressor reads it, causal."""
        lane = all_concepts(step.position_BT, step.valid_BT)
        with self.compressing():
            return self._normed(
                spine,
                h_BSD,
                step.position_BT,
                step.rope,
                self._mask(lane, lane, not step.padded),
                cache,
            )

    def compressing(self):
        """A context in which the base has the compressor's adapter."""
        return adapter(self.backbone, COMPRESSOR)

    def _normed(
        self,
        spine: Spine,
        h_BnD: Tensor,
        position_Bn: Tensor,
        rope: Rope,
        mask,
        cache: DynamicCache | None = None,
    ):
        """(B, n, D) states after the layers that the compressor reads with, normed: the last
        layers' are of any size."""
        h_BnD = spine.run(0, self.config.depth or len(spine), h_BnD, position_Bn, rope, mask, cache)
        return F.rms_norm(h_BnD.float(), h_BnD.shape[-1:])

    def _segments(self, x_BTD, h_BTD, score_BT, written_BT, pack, step, open_segment):
        """What each token of a segment says, added up."""
        length_BC = pack.index_BC.diff(dim=1, prepend=torch.full_like(pack.index_BC[:, :1], -1))
        length_BT = length_BC.gather(
            1, (written_BT.cumsum(1) - written_BT.long()).clamp(max=length_BC.shape[1] - 1)
        )
        said_BTD, weight_BT = (
            self.said(h_BTD, step.ids_BT, places(written_BT), length_BT),
            step.valid_BT,
        )
        if self.gate.boundary.accumulates and self.bins is None:
            weight_BT = weight_BT * score_BT
        h_BCD, open_segment = pack.pool(said_BTD, weight_BT, written_BT, open_segment)
        return (
            self.marked(h_BCD * length_BC.unsqueeze(-1), length_BC),
            pack.pack(step.embed_BTD),
            open_segment,
        )

    def said(self, news: Tensor, ids: Tensor, place: Tensor, length: Tensor) -> Tensor:
        """(…, D) what tokens add to the states of their segments: news, turned by their places, or
        the vectors of their bins."""
        return (
            turn(news, place)
            if self.bins is None
            else self.codes.scale.float() * self.bins(ids, place, length)
        )

    def marked(self, h: Tensor, length: Tensor) -> Tensor:
        """(…, D) states of segments with their lengths told."""
        return self.codes.to_states(self.reader.marked(self.codes.normalise(h), length))

    def _texts_for_codes(self, ids_NT: Tensor, seed: int) -> list[Tensor]:
        return [ids_NT]  # a vocabulary in random order has no segments worth a code

    _code_states = Starting._written_states

    @torch.no_grad()
    def start_frame(self, ids_NT: Tensor, rate: float | None = None) -> dict[str, float]:
        """As every model that writes concepts; ahead of it, what the past foretells, and the scale
        of what the decompressor is told."""
        spine, states, words = Spine(self.backbone), [], []
        taken = None if self.bins is None else Confusion(self.bins.bin_LV.shape[1])
        parts = ids_NT.to(self.device).split(max(1, 1024 // ids_NT.shape[1]))
        for ids_BT in tqdm(
            parts, desc="what the base foresees", unit="batch", disable=None, leave=False
        ):  # None: off in pipes
            h_BSD = spine.embed(self.opened(ids_BT))
            words.append(h_BSD.float())
            if self.reads:
                states.append(
                    self._contextual(spine, h_BSD, self._step(spine, h_BSD, None, None, None))
                )
            if taken is not None:
                log_p_BTV = (
                    self.backbone(input_ids=self.opened(ids_BT), use_cache=False)
                    .logits[:, :-1]
                    .float()
                    .log_softmax(-1)
                )
                taken.add(log_p_BTV.flatten(0, 1), ids_BT.flatten())
        if taken is not None:
            self.bins.start(taken.rivals())
        embed_NSD = torch.cat(words)
        self.reader.start(float(embed_NSD[:, 1:].square().mean().sqrt()))
        if not self.reads:
            return super().start_frame(ids_NT, rate, embed_NSD)
        seen_NSD = torch.cat(states)
        found = {
            "foretold": self.foretold.start(
                seen_NSD[:, :-1].flatten(0, 1), embed_NSD[:, 1:].flatten(0, 1)
            )
        }
        return found | super().start_frame(ids_NT, rate, self._news(embed_NSD, seen_NSD))

    @torch.no_grad()
    def start_codes(self, ids_NT: Tensor, seed: int = 0) -> dict[str, float]:
        """As every model that writes concepts; and what votes weigh, by trial on a little text."""
        if self.bins is None:
            found = super().start_codes(ids_NT, seed)
        else:
            found = self._start_spelling()
            with self.drawing(seed):
                self.calibrate_gate(ids_NT)
        few_NT = ids_NT[:32].to(self.device)
        embed_VD, out_VD = self.get_input_embeddings().weight, self.get_output_embeddings().weight
        unit_DD = torch.eye(embed_VD.shape[1], device=self.device)
        if out_VD is not embed_VD and self.bins is None:
            unit_DD = linear_fit(embed_VD, out_VD, 1e-4)[0].T.to(unit_DD)
        was_training = self.training
        self.eval()
        with self.drawing(seed):
            made = self.encode(few_NT)
        logits_of = self._heard(Spine(self.backbone), made)
        self.reader.vote.weight.copy_(unit_DD)
        tried, each = (
            {},
            1.0
            if self.bins is not None
            else 1 / float(out_VD.float().square().mean().sqrt() * len(unit_DD)),
        )
        for weight in VOTES:
            self.reader.gain.fill_(weight * each)
            tried[weight] = float(
                F.cross_entropy(logits_of()[:, :-1].flatten(0, 1).float(), few_NT.flatten())
            )
        best = min(tried, key=tried.get)
        self.reader.gain.fill_(best * each)
        self.train(was_training)
        return found | {"vote": best, "vote_nll": tried[best]}

    @torch.no_grad()
    def _start_spelling(self) -> dict[str, float]:
        """Codes that spell bins, instead of those of k-means; what is left over stays with no
        segment at all."""
        bins, codes = self.bins, self.codes
        for g in range(codes.codes_per_concept):
            first, table_KD = 0, torch.zeros_like(codes.weight[g])
            for length, count in enumerate(bins.counts, 1):
                x_nD = bins.codes(g, length)
                if g > 0:
                    x_nD = self.reader.content(x_nD)
                else:
                    h_nD = self.marked(
                        codes.scale.float() * x_nD,
                        torch.full((len(x_nD),), length, device=x_nD.device),
                    )
                    x_nD = codes.normalise(h_nD)
                table_KD[first : first + len(x_nD)] = x_nD
                first += count
            codes.weight[g] = table_KD
            self.head.start(
                g, table_KD, torch.tensor(SHARPNESS / table_KD.shape[1], device=table_KD.device)
            )
        return {"codes": float(sum(bins.counts))}

    def encode(
        self, ids_BT: Tensor, attention_mask: Tensor | None = None, ablation: str | None = None
    ) -> Encoded:
        """The concepts of (B, T) texts; `attention_mask` is 0 on padding, which stands on the
        right."""
        spine, ids_BS = Spine(self.backbone), self.opened(ids_BT)
        mask_BS = None if attention_mask is None else F.pad(attention_mask, (1, 0), value=1)
        h_BSD = spine.embed(ids_BS)
        step = self._step(spine, h_BSD, mask_BS, None, None)
        step.ids_BT = ids_BS
        read = self._read(
            None if self.segmenter is not None else self._shallow(spine, h_BSD, step), step
        )
        e_BCD, ids_BC = self._write(read, step, ablation)
        if (
            self.training and self.gate.boundary.learned
        ):  # forward e; backward the gate learns what the state is worth
            p_BC1 = torch.sigmoid(read.pack.pack(read.margin_BT) * read.coded_BC).unsqueeze(-1)
            e_BCD = e_BCD + (p_BC1 - p_BC1.detach()) * (e_BCD - self.codes.mean).detach()
        return Encoded(read, e_BCD, ids_BC, ids_BS, step.valid_BT)

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

        Returns logits (B, T, V) as a language model's: those at t are of token t + 1."""
        self.refuse_unknown(kwargs)
        spine, share = Spine(self.backbone), self.config.continuation_share
        made = self.encode(input_ids, attention_mask, ablation)
        logits_BSV = self._heard(spine, made)()
        ids_BS = torch.full_like(made.ids_BS, NULL).scatter(
            1, made.read.pack.index_BC, torch.where(made.read.coded_BC, made.ids_BC, NULL)
        )
        loss = term = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            target_BT = (
                labels if attention_mask is None else labels.masked_fill(attention_mask == 0, -100)
            )
            count = (target_BT != -100).sum() if items is None else items
            nll_BT = F.cross_entropy(
                logits_BSV[:, :-1].flatten(0, 1).float(), target_BT.flatten(), reduction="none"
            )
            loss = (1 - share) * nll_BT.sum() / count
            more = torch.zeros_like(loss)
            if share > 0:
                loss = (
                    loss
                    + share
                    * self._continuation_loss(spine, input_ids, labels)
                    * (target_BT != -100).sum()
                    / count
                )
            if self.training and self.segmenter is not None:
                lengths = self._length_term(made.read, made.rank_BT, nll_BT.view_as(labels))
                more = more + lengths * (target_BT != -100).sum() / count
            if self.training:  # every rank's gradients in step, whatever its batch used
                more = (
                    more + sum(p.float().sum() for p in self.parameters() if p.requires_grad) * 0.0
                )
            term = more
            loss = loss + term
        return CompressorOutput(
            loss=loss, logits=logits_BSV[:, 1:], concept_ids=ids_BS[:, 1:], term=term
        )

    @torch.no_grad()
    def compress(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> list[list[int]]:
        """The concept ids of each row, each below K^G; padding stands on the right."""
        made = self.encode(ids_BT.to(self.device), attention_mask)
        return [
            ids[coded].tolist() for ids, coded in zip(made.ids_BC, made.read.coded_BC, strict=True)
        ]
