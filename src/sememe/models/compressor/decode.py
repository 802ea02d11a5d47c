"""The decompressor: concepts → the text again, or how the text goes on.

It sees the concepts and its own words alone. Suffixes as in `concepts`; S = 1 + T counts the BOS.
While a text is written n counts beams. x are normalised concept states."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.split import Spine
from sememe.concepts.bins import WordBins
from sememe.concepts.news import SegmentReader
from sememe.models.compressor.beams import Beams
from sememe.models.compressor.entries import run_entries

ADAPTER = "decompressor"


class Decompressor(nn.Module):
    """The base with an adapter, told of each token by the concept that covers it.

    Args:
        bins: of words, where concepts name bins; None where they hold news."""

    def __init__(self, width: int, lengths: int, bins: WordBins | None):
        super().__init__()
        self.reader = SegmentReader(width, lengths)
        self.bins = bins

    def _inputs(self, embed: Tensor, x: Tensor, offset: Tensor) -> Tensor:
        """(…, D) embeddings of the tokens before, with what concepts say of the tokens at those
        offsets in their segments."""
        return embed + self.reader(x.to(self.reader.state.weight.dtype), offset).to(embed.dtype)

    def scores(
        self, spine: Spine, h: Tensor, x: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(…, V) logits from last states (…, D) in two parts: the language model's, and the votes
        of bins. Votes of news are part of what lm_head reads."""
        x = x.to(self.reader.vote.weight.dtype)
        vote = self.reader.votes(x, offset)
        h = spine.decoder.norm(h)
        if self.bins is None:
            return spine.base.lm_head(h + vote.to(h.dtype)), None
        return spine.base.lm_head(h), self.bins.votes(vote, offset, self.reader.length(x)).to(
            h.dtype
        )

    def states(self, spine: Spine, ids_BS: Tensor, x_BSD: Tensor, offset_BS: Tensor) -> Tensor:
        """(B, S, D) last states over a text, given the concepts that cover each next token."""
        embed_BSD = spine.embed(ids_BS)
        # No concept covers what follows the text.
        inputs_BTD = self._inputs(embed_BSD[:, :-1], x_BSD[:, :-1], offset_BS[:, :-1])
        inputs_BSD = torch.cat([inputs_BTD, embed_BSD[:, -1:]], 1)
        position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
        with adapter(spine.base, ADAPTER):
            return run_entries(spine, len(spine), inputs_BSD, position_BS)

    def logits(self, spine: Spine, h: Tensor, x: Tensor, offset: Tensor) -> Tensor:
        """(…, V) logits, both parts together."""
        logits, votes = self.scores(spine, h, x, offset)
        return logits if votes is None else logits + votes

    def continuation_logits(
        self,
        spine: Spine,
        ids_BS: Tensor,
        x_BCD: Tensor | None = None,
        coded_BC: Tensor | None = None,
        position_C: Tensor | None = None,
    ) -> Tensor:
        """(B, T, V) logits of each token of (B, 1 + T) texts with their BOS, given those before it
        and the concepts of what came before them, if anything did, each at its position."""
        embed_BTD = spine.embed(ids_BS[:, :-1])
        count = embed_BTD.shape[1]
        position_BT = torch.arange(count, device=ids_BS.device).expand(len(ids_BS), -1)
        if x_BCD is None:
            with adapter(spine.base, ADAPTER):
                return spine.logits(run_entries(spine, len(spine), embed_BTD, position_BT))
        concepts_B1 = coded_BC.sum(1, keepdim=True)
        position_BC = position_C.expand(coded_BC.shape)
        end_B1 = position_BC.gather(1, (concepts_B1 - 1).clamp(min=0))
        c_BCD = self._inputs(embed_BTD.new_zeros(()), x_BCD, torch.zeros_like(position_BC))
        # The BOS stays first, an attention sink; the concepts follow it, and the new words them.
        inputs_BKD = torch.cat([embed_BTD[:, :1], c_BCD, embed_BTD[:, 1:]], 1)
        position_BK = torch.cat([position_BT[:, :1], position_BC, position_BT[:, 1:] + end_B1], 1)
        real_BT = torch.ones_like(position_BT, dtype=torch.bool)
        valid_BK = torch.cat([real_BT[:, :1], coded_BC, real_BT[:, 1:]], 1)
        with adapter(spine.base, ADAPTER):
            h_BKD = run_entries(spine, len(spine), inputs_BKD, position_BK, valid_BK)
        # The first new token is predicted where the concepts end.
        first_B1D = h_BKD.gather(1, concepts_B1.unsqueeze(-1).expand(-1, -1, h_BKD.shape[-1]))
        return spine.logits(torch.cat([first_B1D, h_BKD[:, 1 + x_BCD.shape[1] :]], 1))

    def write(
        self, spine: Spine, x_BCD: Tensor, count_B: Tensor, bos: int, width: int
    ) -> list[list[int]]:
        """The token ids of the likeliest text of each row that a beam search of that width finds;
        cached. `count_B` concepts of each row are real."""
        rows, device = len(x_BCD), x_BCD.device
        row_B = torch.arange(rows, device=device)
        rank_B = torch.zeros_like(count_B)
        offset_B = torch.zeros_like(count_B)
        beams = Beams(rows, bos, device)
        cache = DynamicCache()
        steps = 0
        with adapter(spine.base, ADAPTER):
            while bool((rank_B < count_B).any()):
                x_BD = x_BCD[row_B, rank_B.clamp(max=x_BCD.shape[1] - 1)]
                x_nD = x_BD[beams.row_n]
                offset_n = offset_B[beams.row_n]
                inputs_nD = self._inputs(spine.embed(beams.token_n), x_nD, offset_n)
                steps += 1
                position_nK = torch.arange(steps, device=device).expand(len(x_nD), -1)
                h_nD = run_entries(
                    spine, len(spine), inputs_nD.unsqueeze(1), position_nK, cache=cache
                )[:, 0]
                # A word that fits its bin after a wrong one is as good as any other there, but was
                # not to be predicted: votes are added to log p, not to what is normed over.
                logits_nV, votes_nV = self.scores(spine, h_nD, x_nD, offset_n)
                score_nV = logits_nV.float().log_softmax(-1)
                if votes_nV is not None:
                    score_nV = score_nV + votes_nV
                parent_n = beams.extend(score_nV, rank_B < count_B, width)
                if width > 1:
                    cache.batch_select_indices(parent_n)
                ends_B = offset_B + 1 >= self.reader.length(x_BD)
                rank_B = rank_B + ends_B
                offset_B = torch.where(ends_B, 0, offset_B + 1)
        return beams.best()
