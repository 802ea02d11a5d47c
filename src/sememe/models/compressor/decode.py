"""The decompressor: concepts → the text again, or how the text goes on.

It sees the concepts and its own words alone. Suffixes as in `concepts`; S = 1 + T counts the BOS.
While a text is written n counts beams. x are normalised concept states."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.split import Spine
from sememe.concepts.bins import rotate
from sememe.concepts.news import SegmentSum
from sememe.models.compressor.beams import Beams
from sememe.models.compressor.entries import run_entries

ADAPTER = "decompressor"


class Decompressor(nn.Module):
    """The base with an adapter, told of each token by the concept that covers it: by what is added
    to the embedding of the token before, for the layers to use, and by votes that are added to what
    lm_head reads, so that codes learn from the words in one step.

    Args:
        segments: the compressor's readout, which knows what its states are made of."""

    def __init__(self, width: int, lengths: int, segments: SegmentSum):
        super().__init__()
        # Not as a submodule: its weights are the writer's.
        object.__setattr__(self, "segments", segments)
        self.state = nn.Linear(width, width)
        self.place = nn.Embedding(lengths, width)
        self.vote = nn.Linear(width, width, bias=False)
        # Of the embeddings: one learning rate fits every base.
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("gain", torch.zeros(()))
        for p in (self.state.bias, self.place.weight, self.vote.weight):
            nn.init.zeros_(p)

    @torch.no_grad()
    def start(self, scale: float) -> None:
        """States become a random rotation of themselves, which says nothing that the embeddings (of
        this `scale`) say already, and a tenth as large, since votes are all that is understood at
        first (docs/log.md)."""
        self.scale.fill_(scale)
        nn.init.orthogonal_(self.state.weight, gain=0.1)

    def inputs(self, embed: Tensor, x: Tensor, offset: Tensor) -> Tensor:
        """(…, D) embeddings of the tokens before, with what concepts say of the tokens at those
        offsets in their segments."""
        added = self.state(x.to(self.state.weight.dtype)) + self.place(offset)
        return embed + (self.scale.to(added.dtype) * added).to(embed.dtype)

    def votes(self, x: Tensor, offset: Tensor) -> Tensor:
        """(…, D) the token's news as the segment has it, for the words that are like it; with bins
        their vectors."""
        x = x.to(self.vote.weight.dtype)
        return self.gain.to(x.dtype) * self.vote(rotate(self.segments.content(x), -offset))

    def scores(
        self, spine: Spine, h: Tensor, x: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(…, V) logits from last states (…, D) in two parts: the language model's, and the votes
        of bins. Votes of news are part of what lm_head reads."""
        vote, h, bins = self.votes(x, offset), spine.decoder.norm(h), self.segments.bins
        if bins is None:
            return spine.base.lm_head(h + vote.to(h.dtype)), None
        return spine.base.lm_head(h), bins.votes(vote, offset, self.segments.length(x)).to(h.dtype)

    def states(self, spine: Spine, ids_BS: Tensor, x_BSD: Tensor, offset_BS: Tensor) -> Tensor:
        """(B, S, D) last states over a text, given the concepts that cover each next token."""
        inputs_BSD = self.inputs(spine.embed(ids_BS), x_BSD, offset_BS)
        position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
        with adapter(spine.base, ADAPTER):
            return run_entries(spine, len(spine), inputs_BSD, position_BS)

    def logits(self, spine: Spine, h: Tensor, x: Tensor, offset: Tensor) -> Tensor:
        """(…, V) logits, both parts together."""
        logits, votes = self.scores(spine, h, x, offset)
        return logits if votes is None else logits + votes

    def continuation_logits(
        self, spine: Spine, ids_BS: Tensor, x_BCD: Tensor, coded_BC: Tensor, position_C: Tensor
    ) -> Tensor:
        """(B, T, V) logits of each token of (B, 1 + T) texts with their BOS, given those before it
        and the concepts of what came before them, each at its position."""
        embed_BTD = spine.embed(ids_BS[:, :-1])
        c_BCD = self.inputs(embed_BTD.new_zeros(()), x_BCD, torch.zeros_like(position_C))
        # The BOS stays first, an attention sink; the concepts follow it, and the new words them.
        inputs_BKD = torch.cat([embed_BTD[:, :1], c_BCD, embed_BTD[:, 1:]], 1)
        before_BC = F.pad(position_C, (1, 0)).expand(len(ids_BS), -1)
        count_B1 = coded_BC.sum(1, keepdim=True)
        word_T = torch.arange(1, embed_BTD.shape[1], device=ids_BS.device)
        position_BK = torch.cat([before_BC, before_BC.gather(1, count_B1) + word_T], 1)
        valid_BK = F.pad(coded_BC, (1, len(word_T)), value=True)
        with adapter(spine.base, ADAPTER):
            h_BKD = run_entries(spine, len(spine), inputs_BKD, position_BK, valid_BK)
        # The first new token is predicted where the concepts end.
        first_B1D = h_BKD.take_along_dim(count_B1.unsqueeze(-1), 1)
        return spine.logits(torch.cat([first_B1D, h_BKD[:, before_BC.shape[1] :]], 1))

    def write(
        self, spine: Spine, x_BCD: Tensor, count_B: Tensor, bos: int, width: int
    ) -> list[list[int]]:
        """The token ids of the likeliest text of each row that a beam search of that width finds;
        cached. `count_B` concepts of each row are real."""
        rank_B, offset_B = torch.zeros_like(count_B), torch.zeros_like(count_B)
        beams = Beams(len(x_BCD), bos, x_BCD.device)
        cache = DynamicCache()
        with adapter(spine.base, ADAPTER):
            while bool((rank_B < count_B).any()):
                rank_B11 = rank_B.clamp(max=x_BCD.shape[1] - 1)[:, None, None]
                x_BD = x_BCD.take_along_dim(rank_B11, 1).squeeze(1)
                x_nD = x_BD[beams.row_n]
                offset_n = offset_B[beams.row_n]
                inputs_nD = self.inputs(spine.embed(beams.token_n), x_nD, offset_n)
                position_K = torch.arange(beams.text_nS.shape[1] + 1, device=x_nD.device)
                position_nK = position_K.expand(len(x_nD), -1)
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
                ends_B = offset_B + 1 >= self.segments.length(x_BD)
                rank_B = rank_B + ends_B
                offset_B = torch.where(ends_B, 0, offset_B + 1)
        return beams.best()
