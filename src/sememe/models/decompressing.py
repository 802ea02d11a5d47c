"""Decompressing: the half of a compressor that reads concepts: the text again, or how it goes on.

Suffixes as in `concepts`; S = 1 + T counts the BOS. While a text is written n counts beams.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.split import Spine
from sememe.concepts.masks import Lane
from sememe.errors import CheckpointError
from sememe.models.beams import Beams
from sememe.models.writing import Reading, all_concepts

DECOMPRESSOR = "decompressor"
TEXTS_AT_ONCE = 256  # beams of all rows that are written together, each with a cache of its own


@dataclass
class Encoded:
    """What the compressor made of (B, T) texts. The BOS is concept 0 of each row; it carries
    nothing and is not counted."""

    read: Reading
    e_BCD: Tensor
    ids_BC: Tensor
    ids_BS: Tensor  # the BOS and the text
    valid_BS: Tensor

    @property
    def rank_BT(self) -> Tensor:
        """Which concept covers each token: the first that is written at it or behind it; some
        concept on padding."""
        return self.read.written_BT.cumsum(1)[:, :-1].clamp(max=self.e_BCD.shape[1] - 1)

    @property
    def place_BT(self) -> Tensor:
        """Places of the tokens in their segments, from 0; 0 on padding."""
        return places(self.read.written_BT)[:, 1:].masked_fill(~self.valid_BS[:, 1:], 0)


def places(written_BS: Tensor) -> Tensor:
    """(B, S) places in their segments, from 0, of what stands where a concept is written and behind
    the one before."""
    at_BS = torch.arange(written_BS.shape[1], device=written_BS.device).expand(written_BS.shape)
    last_BS = torch.where(written_BS, at_BS, 0).cummax(1).values
    return torch.cat([torch.zeros_like(at_BS[:, :1]), (at_BS - last_BS)[:, :-1]], 1)


class Decompressing:
    """Mixin of the compressor. The decompressor sees its own words and the concepts alone."""

    def _decompressor(
        self, spine: Spine, x_BnD: Tensor, position_Bn: Tensor, valid_Bn: Tensor | None = None
    ) -> Tensor:
        """Last states (B, n, D) over inputs (B, n, D)."""
        valid_Bn = torch.ones_like(position_Bn, dtype=torch.bool) if valid_Bn is None else valid_Bn
        lane = all_concepts(position_Bn, valid_Bn)
        with adapter(self.backbone, DECOMPRESSOR):
            return spine.run(
                0,
                len(spine),
                x_BnD,
                position_Bn,
                spine.rope(x_BnD, position_Bn),
                self._mask(lane, lane, bool(valid_Bn.all())),
            )

    def told(self, e: Tensor, place: Tensor) -> Tensor:
        """(…, D) concept states and (…,) places in their segments → (…, D), added to the embedding
        of the token before."""
        return self.reader(self.codes.normalise(e).to(self.reader.state.weight.dtype), place)

    def _voted(self, spine: Spine, h: Tensor, e: Tensor, place: Tensor) -> Tensor:
        """(…, V) logits from last states (…, D), concept states and places."""
        foreseen, votes = self._foreseen(spine, h, e, place)
        return foreseen if votes is None else foreseen + votes

    def _foreseen(
        self, spine: Spine, h: Tensor, e: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The two parts of these logits: what the words before say, and the votes where they are
        for bins."""
        x = self.codes.normalise(e).to(self.reader.vote.weight.dtype)
        vote, h = self.reader.votes(x, place), spine.decoder.norm(h)
        if self.bins is None:
            return spine.base.lm_head(h + vote.to(h.dtype)), None
        return spine.base.lm_head(h), self.bins.votes(vote, place, self.reader.length(x)).to(
            h.dtype
        )

    def _heard(self, spine: Spine, made: Encoded) -> Callable[[], Tensor]:
        """The decompressor over a text, as what makes its logits (B, S, V): votes may be weighed
        anew."""
        e_BTD = made.e_BCD.gather(
            1, made.rank_BT.unsqueeze(-1).expand(-1, -1, made.e_BCD.shape[-1])
        )
        x_BTD = self.told(e_BTD, made.place_BT).to(made.e_BCD.dtype)
        x_BSD = spine.embed(made.ids_BS) + F.pad(
            x_BTD, (0, 0, 0, 1)
        )  # nothing is told of what comes behind the text
        position_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device).expand(x_BSD.shape[:2])
        h_BSD = self._decompressor(spine, x_BSD, position_BS)
        return lambda: self._voted(
            spine, h_BSD, F.pad(e_BTD, (0, 0, 0, 1)), F.pad(made.place_BT, (0, 1))
        )

    def concept_places(self, concepts: int) -> Tensor:
        """(C,) where concepts stand that a text goes on from: the places that the rate gives them,
        which ids alone tell."""
        return torch.round((torch.arange(concepts, device=self.device) + 1) / self.dial.rate).long()

    def _continuation_loss(self, spine: Spine, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Nats per token of the second half of each text, given the concepts of the first."""
        half = ids_BT.shape[1] // 2
        logits_BTV = self.continuation_logits(self.encode(ids_BT[:, :half]), ids_BT[:, half:])
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT[:, half:].flatten())

    def continuation_logits(self, made: Encoded | None, ids_BT: Tensor) -> Tensor:
        """(B, T, V) logits of each of the (B, T) tokens, given those before it and the concepts of
        what came before them (None: nothing did)."""
        spine = Spine(self.backbone)
        x_BTD = spine.embed(self.opened(ids_BT)[:, :-1])
        position_Bn = torch.arange(x_BTD.shape[1], device=self.device).expand(x_BTD.shape[:2])
        valid_Bn = None
        if made is not None:
            e_BCD, coded_BC = made.e_BCD[:, 1:], made.read.coded_BC[:, 1:]
            place_BC = self.concept_places(e_BCD.shape[1]).expand(coded_BC.shape)
            c_BCD = self.told(e_BCD, torch.zeros_like(place_BC)).to(x_BTD.dtype)
            ahead_B1 = place_BC.gather(1, (coded_BC.sum(1, keepdim=True) - 1).clamp(min=0))
            # The BOS stays the first of all, an attention sink; the concepts stand behind it, the
            # new words behind them.
            x_BTD = torch.cat([x_BTD[:, :1], c_BCD, x_BTD[:, 1:]], 1)
            position_Bn = torch.cat(
                [position_Bn[:, :1], place_BC, position_Bn[:, 1:] + ahead_B1], 1
            )
            real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            valid_Bn = torch.cat([real_BT[:, :1], coded_BC, real_BT[:, 1:]], 1)
        h_BnD = self._decompressor(spine, x_BTD, position_Bn, valid_Bn)
        if made is not None:  # the first new token is predicted where the concepts end
            count_B1 = made.read.coded_BC[:, 1:].sum(1, keepdim=True)
            first_B1D = h_BnD.gather(1, count_B1.unsqueeze(-1).expand(-1, -1, h_BnD.shape[-1]))
            h_BnD = torch.cat([first_B1D, h_BnD[:, made.e_BCD.shape[1] :]], 1)
        return spine.logits(h_BnD)

    @torch.no_grad()
    def decompress(self, concepts: list[list[int]], beams: int | None = None) -> list[list[int]]:
        """The token ids that each row's concept ids are read as, the likeliest that a search with
        so many beams finds (None: as configured); cached, many rows at once. A row without concepts
        is an empty text.

        Raises CheckpointError for an id that this model has no code for."""
        spine, config, rows = Spine(self.backbone), self.config, len(concepts)
        most = config.num_concepts**config.codes_per_concept
        wrong = [i for ids in concepts for i in ids if not 0 <= i < most]
        if wrong:
            raise CheckpointError(
                f"concept id {wrong[0]}: need ids from 0 to {most - 1}, as this model writes them. "
                "try: the model that compressed the text"
            )
        beams, longest, device = (
            beams or config.beams,
            max(map(len, concepts), default=0),
            self.device,
        )
        if longest == 0:
            return [[] for _ in concepts]
        some = max(1, TEXTS_AT_ONCE // beams)
        if rows > some:
            return [
                text
                for start in range(0, rows, some)
                for text in self.decompress(concepts[start : start + some], beams)
            ]
        ids_BC = torch.tensor([ids + [0] * (longest - len(ids)) for ids in concepts], device=device)
        e_BCD, count_B = (
            self.codes(ids_BC),
            torch.tensor([len(ids) for ids in concepts], device=device),
        )
        cache, row_B, position = DynamicCache(), torch.arange(rows, device=device), 0
        rank_B, place_B = torch.zeros_like(count_B), torch.zeros_like(count_B)
        found = Beams(rows, self.bos, device)
        with adapter(self.backbone, DECOMPRESSOR):
            while bool((rank_B < count_B).any()):
                e_BD = e_BCD[row_B, rank_B.clamp(max=longest - 1)]
                e_nD, place_n = e_BD[found.row_n], place_B[found.row_n]
                x_nD = spine.embed(found.token_n) + self.told(e_nD, place_n).to(self.dtype)
                position_n1 = torch.full_like(found.row_n, position).unsqueeze(1)
                h_nD = self._next(spine, x_nD.unsqueeze(1), position_n1, cache)
                # A word that fits its bin after a wrong one is as good as any other there, but was
                # not to be foreseen: votes are added to log p, not to what is normed over.
                foreseen_nV, votes_nV = self._foreseen(spine, h_nD, e_nD, place_n)
                score_nV = foreseen_nV.float().log_softmax(-1) + (
                    0.0 if votes_nV is None else votes_nV
                )
                came_n = found.go_on(score_nV, rank_B < count_B, beams)
                if came_n is not None:
                    cache.batch_select_indices(came_n)
                position += 1
                ends_B = place_B + 1 >= self.reader.length(self.codes.normalise(e_BD))
                rank_B, place_B = rank_B + ends_B, torch.where(ends_B, 0, place_B + 1)
        return found.best()

    def _next(
        self, spine: Spine, x_B1D: Tensor, position_B1: Tensor, cache: DynamicCache
    ) -> Tensor:
        """(B, D) last states of one more position."""
        place_1S = torch.arange(int(position_B1[0, 0]) + 1, device=x_B1D.device)[None]
        key = all_concepts(place_1S, torch.ones_like(place_1S, dtype=torch.bool))
        query = Lane(*(field[:, -1:] for field in key))
        mask = self._mask(query, key, free=True)
        return spine.run(
            0, len(spine), x_B1D, position_B1, spine.rope(x_B1D, position_B1), mask, cache
        )[:, 0]
