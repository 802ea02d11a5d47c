"""Compressor and decompressor: (B, T) ids → concept ids → the text again, (B, T, V) logits (docs/concepts.md).

    BOS x ─ base + adapter "compressor" ─ h ─ gate and head ─ z ─ code ─ e ┐
    BOS x ─ embed ─ (+) ── e of the segment that the next token lies in ───┘─ base + adapter "decompressor" ─ p(x_t)

One frozen base, two adapters. The compressor sees the text; the decompressor its own words and the concepts alone. How many
tokens a concept stands for it says itself, so that the next one is read when it is its turn. To go on from a text instead
of writing it, the concepts stand ahead of the new words, each at the place that the rate gives it.
Suffixes as in `concepts`; S = 1 + T counts the BOS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.adapters import adapter, add_lora
from sememe.backbone.split import Rope, Spine
from sememe.concepts.bins import Confusion, WordBins
from sememe.concepts.codebook import SHARPNESS, ConceptEmbedding
from sememe.concepts.fit import linear_fit
from sememe.concepts.gate import RateGate
from sememe.concepts.head import HEADS
from sememe.concepts.masks import Lane
from sememe.concepts.news import Foretold, turn
from sememe.concepts.reader import SegmentReader
from sememe.errors import CheckpointError
from sememe.models.adapted import AdaptedModel
from sememe.models.beams import Beams
from sememe.models.configuration import CompressorConfig
from sememe.models.segmenting import Segmenter, Segmenting
from sememe.models.starting import Starting
from sememe.models.writing import NULL, Reading, Step, Writing, all_concepts

COMPRESSOR, DECOMPRESSOR = "compressor", "decompressor"
VOTES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # logits that the mean word's own news may give it, at the start


@dataclass
class CompressorOutput(CausalLMOutputWithPast):
    """`concept_ids` (B, T): the id that each token wrote; NULL -1. `term`: what codes and lengths added to `loss`."""

    concept_ids: Tensor | None = None
    term: Tensor | None = None


@dataclass
class Encoded:
    """What the compressor made of (B, T) texts. The BOS is concept 0 of each row; it carries nothing and is not counted."""

    read: Reading
    e_BCD: Tensor
    ids_BC: Tensor
    ids_BS: Tensor  # the BOS and the text
    valid_BS: Tensor
    term: Tensor | None

    @property
    def rank_BT(self) -> Tensor:
        """Which concept covers each token: the first that is written at it or behind it; some concept on padding."""
        return self.read.written_BT.cumsum(1)[:, :-1].clamp(max=self.e_BCD.shape[1] - 1)

    @property
    def place_BT(self) -> Tensor:
        """Places of the tokens in their segments, from 0; 0 on padding."""
        return places(self.read.written_BT)[:, 1:].masked_fill(~self.valid_BS[:, 1:], 0)


def places(written_BS: Tensor) -> Tensor:
    """(B, S) places in their segments, from 0, of what stands where a concept is written and behind the one before."""
    at_BS = torch.arange(written_BS.shape[1], device=written_BS.device).expand(written_BS.shape)
    last_BS = torch.where(written_BS, at_BS, 0).cummax(1).values
    return torch.cat([torch.zeros_like(at_BS[:, :1]), (at_BS - last_BS)[:, :-1]], 1)


class CompressorForCausalLM(Segmenting, Starting, Writing, AdaptedModel):
    """The base with two adapters, and a head, codes and gate between them."""

    config_class = CompressorConfig
    supports_gradient_checkpointing = False  # recomputed layers would meet whichever adapter is on by then
    closes_last = True
    bridge = anchor = pool = None
    foldable = False

    def __init__(self, config: CompressorConfig, backbone=None):
        super().__init__(config, backbone)
        config.check()
        width = config.text_config.hidden_size
        self.head = HEADS[config.head](width, config.num_concepts, config.codes_per_concept)
        self.codes = ConceptEmbedding(config.num_concepts, width, config.codes_per_concept, config.shared_map)
        self.gate = RateGate(config.boundary, width, config.gate_noise)
        self.foretold = Foretold(width)
        self.reader = SegmentReader(width, config.max_tail + 1)
        vocab, lengths, boundary = self.get_output_embeddings().weight.shape[0], config.max_tail + 1, self.gate.boundary
        self.bins = None if config.content == "news" else WordBins(
            width, vocab, config.num_concepts, config.codes_per_concept, lengths, config.rate, not boundary.scored)
        self.segmenter = Segmenter(width, config.max_tail + 1, config.rate) if self.gate.boundary.offline else None
        self.finish()

    def add_adapters(self) -> None:
        config = self.config
        for name, last in ((COMPRESSOR, config.depth), (DECOMPRESSOR, None)):
            add_lora(self.backbone, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_first, last, name)

    def merged(self):
        """Raises CheckpointError: two adapters cannot be folded into one base."""
        raise CheckpointError("a compressor's two adapters cannot be folded into one base: need it as it was saved. "
                              "try: sememe compress and decompress on the run itself")

    # ---- the compressor ----

    def opened(self, ids_BT: Tensor) -> Tensor:
        """(B, 1 + T): with the BOS ahead."""
        return torch.cat([torch.full_like(ids_BT[:, :1], self.bos), ids_BT], 1)

    def _shallow(self, spine: Spine, h_BSD: Tensor, step: Step) -> Tensor:
        """What each token says that the texts before it, read by the compressor, did not foretell; nobody asks for it where codes
        spell bins and segments end at fixed places."""
        if self.bins is not None and not self.gate.boundary.scored:
            return h_BSD.float()
        return self._news(h_BSD, self._contextual(spine, h_BSD, step))

    def _news(self, embed_BSD: Tensor, seen_BSD: Tensor) -> Tensor:
        return embed_BSD.float() - F.pad(self.foretold(seen_BSD), (0, 0, 1, 0))[:, :-1]

    def _contextual(self, spine: Spine, h_BSD: Tensor, step: Step, cache: DynamicCache | None = None) -> Tensor:
        """States of the text as the compressor reads it, causal."""
        lane = all_concepts(step.position_BT, step.valid_BT)
        with self.compressing():
            return self._normed(spine, h_BSD, step.position_BT, step.rope, self._mask(lane, lane, not step.padded), cache)

    def compressing(self):
        """A context in which the base has the compressor's adapter."""
        return adapter(self.backbone, COMPRESSOR)

    def _normed(self, spine: Spine, h_BnD: Tensor, position_Bn: Tensor, rope: Rope, mask, cache: DynamicCache | None = None):
        """(B, n, D) states after the layers that the compressor reads with, normed: the last layers' are of any size."""
        h_BnD = spine.run(0, self.config.depth or len(spine), h_BnD, position_Bn, rope, mask, cache)
        return F.rms_norm(h_BnD.float(), h_BnD.shape[-1:])

    def _segments(self, x_BTD, h_BTD, score_BT, written_BT, pack, step, open_segment):
        """What each token of a segment says, added up."""
        length_BC = pack.index_BC.diff(dim=1, prepend=torch.full_like(pack.index_BC[:, :1], -1))
        length_BT = length_BC.gather(1, (written_BT.cumsum(1) - written_BT.long()).clamp(max=length_BC.shape[1] - 1))
        said_BTD, weight_BT = self.said(h_BTD, step.ids_BT, places(written_BT), length_BT), step.valid_BT
        if self.gate.boundary.accumulates and self.bins is None:
            weight_BT = weight_BT * score_BT
        h_BCD, open_segment = pack.pool(said_BTD, weight_BT, written_BT, open_segment)
        return self.marked(h_BCD * length_BC.unsqueeze(-1), length_BC), pack.pack(step.embed_BTD), open_segment

    def said(self, news: Tensor, ids: Tensor, place: Tensor, length: Tensor) -> Tensor:
        """(…, D) what tokens add to the states of their segments: news, turned by their places, or the vectors of their bins."""
        return turn(news, place) if self.bins is None else self.codes.scale.float() * self.bins(ids, place, length)

    def marked(self, h: Tensor, length: Tensor) -> Tensor:
        """(…, D) states of segments with their lengths told."""
        return self.codes.to_states(self.reader.marked(self.codes.normalise(h), length))

    def _texts_for_codes(self, ids_NT: Tensor, seed: int) -> list[Tensor]:
        return [ids_NT]  # a vocabulary in random order has no segments worth a code

    _code_states = Starting._written_states

    @torch.no_grad()
    def start_frame(self, ids_NT: Tensor, rate: float | None = None) -> dict[str, float]:
        """As every model that writes concepts; ahead of it, what the past foretells, and the scale of what the decompressor
        is told."""
        spine, states, words = Spine(self.backbone), [], []
        taken = None if self.bins is None else Confusion(self.bins.bin_LV.shape[1])
        for ids_BT in ids_NT.to(self.device).split(max(1, 1024 // ids_NT.shape[1])):
            h_BSD = spine.embed(self.opened(ids_BT))
            states.append(self._contextual(spine, h_BSD, self._step(spine, h_BSD, None, None, None)))
            words.append(h_BSD.float())
            if taken is not None:
                log_p_BTV = self.backbone(input_ids=self.opened(ids_BT), use_cache=False).logits[:, :-1].float().log_softmax(-1)
                taken.add(log_p_BTV.flatten(0, 1), ids_BT.flatten())
        if taken is not None:
            self.bins.start(taken.rivals())
        seen_NSD, embed_NSD = torch.cat(states), torch.cat(words)
        self.reader.start(float(embed_NSD[:, 1:].square().mean().sqrt()))
        found = {"foretold": self.foretold.start(seen_NSD[:, :-1].flatten(0, 1), embed_NSD[:, 1:].flatten(0, 1))}
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
        tried, each = {}, 1.0 if self.bins is not None else 1 / float(out_VD.float().square().mean().sqrt() * len(unit_DD))
        for weight in VOTES:
            self.reader.gain.fill_(weight * each)
            tried[weight] = float(F.cross_entropy(logits_of()[:, :-1].flatten(0, 1).float(), few_NT.flatten()))
        best = min(tried, key=tried.get)
        self.reader.gain.fill_(best * each)
        self.train(was_training)
        return found | {"vote": best, "vote_nll": tried[best]}

    @torch.no_grad()
    def _start_spelling(self) -> dict[str, float]:
        """Codes that spell bins, instead of those of k-means; what is left over stays with no segment at all."""
        bins, codes = self.bins, self.codes
        for g in range(codes.codes_per_concept):
            first, table_KD = 0, torch.zeros_like(codes.weight[g])
            for length, count in enumerate(bins.counts, 1):
                x_nD = bins.codes(g, length)
                if g > 0:
                    x_nD = self.reader.content(x_nD)
                else:
                    h_nD = self.marked(codes.scale.float() * x_nD, torch.full((len(x_nD),), length, device=x_nD.device))
                    x_nD = codes.normalise(h_nD)
                table_KD[first : first + len(x_nD)] = x_nD
                first += count
            codes.set_rows(g, torch.arange(len(table_KD), device=table_KD.device), table_KD)
            self.head.start(g, table_KD, torch.tensor(SHARPNESS / table_KD.shape[1], device=table_KD.device))
        return {"codes": float(sum(bins.counts))}

    def encode(self, ids_BT: Tensor, attention_mask: Tensor | None = None, ablation: str | None = None) -> Encoded:
        """The concepts of (B, T) texts; `attention_mask` is 0 on padding, which stands on the right."""
        spine, ids_BS = Spine(self.backbone), self.opened(ids_BT)
        mask_BS = None if attention_mask is None else F.pad(attention_mask, (1, 0), value=1)
        h_BSD = spine.embed(ids_BS)
        step = self._step(spine, h_BSD, mask_BS, None, None)
        step.ids_BT = ids_BS
        read = self._read(None if self.segmenter is not None else self._shallow(spine, h_BSD, step), step)
        e_BCD, ids_BC, term = self._write(read, step, ablation)
        if self.training and self.gate.boundary.learned:  # forward e; backward the gate learns what the state is worth
            p_BC1 = torch.sigmoid(read.pack.pack(read.margin_BT) * read.coded_BC).unsqueeze(-1)
            e_BCD = e_BCD + (p_BC1 - p_BC1.detach()) * (e_BCD - self.codes.mean).detach()
        return Encoded(read, e_BCD, ids_BC, ids_BS, step.valid_BT, term)

    # ---- the decompressor ----

    def _decompressor(self, spine: Spine, x_BnD: Tensor, position_Bn: Tensor, valid_Bn: Tensor | None = None) -> Tensor:
        """Last states (B, n, D) over inputs (B, n, D)."""
        valid_Bn = torch.ones_like(position_Bn, dtype=torch.bool) if valid_Bn is None else valid_Bn
        lane = all_concepts(position_Bn, valid_Bn)
        with adapter(self.backbone, DECOMPRESSOR):
            return spine.run(0, len(spine), x_BnD, position_Bn, spine.rope(x_BnD, position_Bn),
                             self._mask(lane, lane, bool(valid_Bn.all())))

    def told(self, e: Tensor, place: Tensor) -> Tensor:
        """(…, D) concept states and (…,) places in their segments → (…, D), added to the embedding of the token before."""
        return self.reader(self.codes.normalise(e).to(self.reader.state.weight.dtype), place)

    def _voted(self, spine: Spine, h: Tensor, e: Tensor, place: Tensor) -> Tensor:
        """(…, V) logits from last states (…, D), concept states and places."""
        foreseen, votes = self._foreseen(spine, h, e, place)
        return foreseen if votes is None else foreseen + votes

    def _foreseen(self, spine: Spine, h: Tensor, e: Tensor, place: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two parts of these logits: what the words before say, and the votes where they are for bins."""
        x = self.codes.normalise(e).to(self.reader.vote.weight.dtype)
        vote, h = self.reader.votes(x, place), spine.decoder.norm(h)
        if self.bins is None:
            return spine.base.lm_head(h + vote.to(h.dtype)), None
        return spine.base.lm_head(h), self.bins.votes(vote, place, self.reader.length(x)).to(h.dtype)

    def _heard(self, spine: Spine, made: Encoded) -> Callable[[], Tensor]:
        """The decompressor over a text, as what makes its logits (B, S, V): votes may be weighed anew."""
        e_BTD = made.e_BCD.gather(1, made.rank_BT.unsqueeze(-1).expand(-1, -1, made.e_BCD.shape[-1]))
        x_BTD = self.told(e_BTD, made.place_BT).to(made.e_BCD.dtype)
        x_BSD = spine.embed(made.ids_BS) + F.pad(x_BTD, (0, 0, 0, 1))  # nothing is told of what comes behind the text
        position_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device).expand(x_BSD.shape[:2])
        h_BSD = self._decompressor(spine, x_BSD, position_BS)
        return lambda: self._voted(spine, h_BSD, F.pad(e_BTD, (0, 0, 0, 1)), F.pad(made.place_BT, (0, 1)))

    @can_return_tuple
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                ablation: str | None = None, **kwargs) -> CompressorOutput:
        """The text through its concepts. `loss`: of writing it again, every token, mixed with going on from its first half.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 0 on padding, on the right.
            labels: (B, T) targets, -100 ignored; None for no loss.
            ablation: replace the codes, see `concepts/ablation.py`.

        Returns logits (B, T, V) as a language model's: those at t are of token t + 1.
        """
        spine, share = Spine(self.backbone), self.config.continuation_share
        made = self.encode(input_ids, attention_mask, ablation)
        logits_BSV = self._heard(spine, made)()
        ids_BS = torch.full_like(made.ids_BS, NULL).scatter(
            1, made.read.pack.index_BC, torch.where(made.read.coded_BC, made.ids_BC, NULL))
        loss, term = None, made.term
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            target_BT = labels if attention_mask is None else labels.masked_fill(attention_mask == 0, -100)
            count = (target_BT != -100).sum() if items is None else items
            nll_BT = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), target_BT.flatten(), reduction="none")
            loss = (1 - share) * nll_BT.sum() / count
            more = torch.zeros_like(loss)
            if share > 0:
                loss = loss + share * self._continuation_loss(spine, input_ids, labels) * (target_BT != -100).sum() / count
            if self.training and self.segmenter is not None:
                lengths = self._length_term(made.read, made.rank_BT, nll_BT.view_as(labels))
                more = more + lengths * (target_BT != -100).sum() / count
            if self.training:  # every rank's gradients in step, whatever its batch used
                more = more + sum(p.float().sum() for p in self.parameters() if p.requires_grad) * 0.0
            term = more if term is None else more + term * (target_BT != -100).sum() / count
            loss = loss + term
        return CompressorOutput(loss=loss, logits=logits_BSV[:, 1:], concept_ids=ids_BS[:, 1:], term=term)

    def concept_places(self, concepts: int) -> Tensor:
        """(C,) where concepts stand that a text goes on from: the places that the rate gives them, which ids alone tell."""
        return torch.round((torch.arange(concepts, device=self.device) + 1) / self.config.rate).long()

    def _continuation_loss(self, spine: Spine, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Nats per token of the second half of each text, given the concepts of the first."""
        half = ids_BT.shape[1] // 2
        logits_BTV = self.continuation_logits(self.encode(ids_BT[:, :half]), ids_BT[:, half:])
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT[:, half:].flatten())

    def continuation_logits(self, made: Encoded | None, ids_BT: Tensor) -> Tensor:
        """(B, T, V) logits of each of the (B, T) tokens, given those before it and the concepts of what came before them
        (None: nothing did)."""
        spine = Spine(self.backbone)
        x_BTD = spine.embed(self.opened(ids_BT)[:, :-1])
        position_Bn = torch.arange(x_BTD.shape[1], device=self.device).expand(x_BTD.shape[:2])
        valid_Bn = None
        if made is not None:
            e_BCD, coded_BC = made.e_BCD[:, 1:], made.read.coded_BC[:, 1:]
            place_BC = self.concept_places(e_BCD.shape[1]).expand(coded_BC.shape)
            c_BCD = self.told(e_BCD, torch.zeros_like(place_BC)).to(x_BTD.dtype)
            ahead_B1 = place_BC.gather(1, (coded_BC.sum(1, keepdim=True) - 1).clamp(min=0))
            # The BOS stays the first of all, an attention sink; the concepts stand behind it, the new words behind them.
            x_BTD = torch.cat([x_BTD[:, :1], c_BCD, x_BTD[:, 1:]], 1)
            position_Bn = torch.cat([position_Bn[:, :1], place_BC, position_Bn[:, 1:] + ahead_B1], 1)
            real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            valid_Bn = torch.cat([real_BT[:, :1], coded_BC, real_BT[:, 1:]], 1)
        h_BnD = self._decompressor(spine, x_BTD, position_Bn, valid_Bn)
        if made is not None:  # the first new token is predicted where the concepts end
            count_B1 = made.read.coded_BC[:, 1:].sum(1, keepdim=True)
            first_B1D = h_BnD.gather(1, count_B1.unsqueeze(-1).expand(-1, -1, h_BnD.shape[-1]))
            h_BnD = torch.cat([first_B1D, h_BnD[:, made.e_BCD.shape[1] :]], 1)
        return spine.logits(h_BnD)

    # ---- use ----

    @torch.no_grad()
    def compress(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> list[list[int]]:
        """The concept ids of each row, each below K^G; padding stands on the right."""
        made = self.encode(ids_BT.to(self.device), attention_mask)
        return [ids[coded].tolist() for ids, coded in zip(made.ids_BC, made.read.coded_BC, strict=True)]

    @torch.no_grad()
    def decompress(self, concepts: list[list[int]], beams: int | None = None) -> list[list[int]]:
        """The token ids that each row's concept ids are read as, the likeliest that a search with so many beams finds (None: as
        configured); cached, all rows at once. A row without concepts is an empty text. Raises CheckpointError for an id that this model has no code for."""
        spine, config, rows = Spine(self.backbone), self.config, len(concepts)
        most = config.num_concepts**config.codes_per_concept
        wrong = [i for ids in concepts for i in ids if not 0 <= i < most]
        if wrong:
            raise CheckpointError(f"concept id {wrong[0]}: need ids from 0 to {most - 1}, as this model writes them. "
                                  "try: the model that compressed the text")
        longest, device = max(map(len, concepts), default=0), self.device
        if longest == 0:
            return [[] for _ in concepts]
        ids_BC = torch.tensor([ids + [0] * (longest - len(ids)) for ids in concepts], device=device)
        e_BCD, count_B = self.codes(ids_BC), torch.tensor([len(ids) for ids in concepts], device=device)
        cache, row_B, position = DynamicCache(), torch.arange(rows, device=device), 0
        rank_B, place_B = torch.zeros_like(count_B), torch.zeros_like(count_B)
        found = Beams(rows, self.bos, device)
        with adapter(self.backbone, DECOMPRESSOR):
            while bool((rank_B < count_B).any()):
                width = found.width
                e_BD = e_BCD[row_B, rank_B.clamp(max=longest - 1)]
                e_nD, place_n = e_BD.repeat_interleave(width, 0), place_B.repeat_interleave(width)
                x_nD = spine.embed(found.token_Bw.flatten()) + self.told(e_nD, place_n).to(self.dtype)
                position_n1 = torch.full((rows * width, 1), position, device=device)
                h_nD = self._next(spine, x_nD.unsqueeze(1), position_n1, cache)
                # A word that fits its bin after a wrong one is as good as any other there, but was not to be foreseen: votes are
                # added to log p, not to what is normed over.
                foreseen_nV, votes_nV = self._foreseen(spine, h_nD, e_nD, place_n)
                score_nV = foreseen_nV.float().log_softmax(-1) + (0.0 if votes_nV is None else votes_nV)
                came_n = found.go_on(score_nV, rank_B < count_B, beams or config.beams)
                if came_n is not None:
                    cache.batch_select_indices(came_n)
                position += 1
                ends_B = place_B + 1 >= self.reader.length(self.codes.normalise(e_BD))
                rank_B, place_B = rank_B + ends_B, torch.where(ends_B, 0, place_B + 1)
        return found.best()

    def _next(self, spine: Spine, x_B1D: Tensor, position_B1: Tensor, cache: DynamicCache) -> Tensor:
        """(B, D) last states of one more position."""
        place_1S = torch.arange(int(position_B1[0, 0]) + 1, device=x_B1D.device)[None]
        key = all_concepts(place_1S, torch.ones_like(place_1S, dtype=torch.bool))
        query = Lane(*(field[:, -1:] for field in key))
        mask = self._mask(query, key, free=True)
        return spine.run(0, len(spine), x_B1D, position_B1, spine.rope(x_B1D, position_B1), mask, cache)[:, 0]
