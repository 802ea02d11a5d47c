"""The decompressor: concepts → the text again, or how the text goes on.

It sees the concepts and its own words alone. Suffixes as in `concepts`; S = 1 + T counts the BOS.
While a text is written n counts beams. x are normalised concept states."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.split import Spine
from sememe.concepts.bins import rotate
from sememe.concepts.segment_sum import SegmentSum
from sememe.concepts.segments import Chunk
from sememe.models.compressor.beams import beam_search
from sememe.models.compressor.entries import run_entries

ADAPTER = "decompressor"


class Decompressor(nn.Module):
    """The base with an adapter, told of each token by the concept that covers it: by what is added
    to the embedding of the token before, for the layers to use, and by votes that are added to what
    lm_head reads, so that codes learn from the words in one step.

    Args:
        segments: the compressor's readout, which knows what its states are made of."""

    def __init__(self, spine: Spine, width: int, lengths: int, segments: SegmentSum):
        super().__init__()
        self.spine = spine
        self.run = partial(run_entries, spine, len(spine))
        # Not as a submodule: its weights are the writer's.
        object.__setattr__(self, "segments", segments)
        self.state = nn.Linear(width, width)
        self.prefix = nn.Linear(width, width)
        self.place = nn.Embedding(lengths, width)
        self.vote = nn.Linear(width, width, bias=False)
        # Of the embeddings: one learning rate fits every base.
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("gain", torch.zeros(()))
        for p in (*self.prefix.parameters(), self.state.bias, self.place.weight, self.vote.weight):
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
        return embed + (self.scale * added).to(embed.dtype)

    def votes(self, x: Tensor, offset: Tensor) -> Tensor:
        """(…, D) the token's vector as the segment has it: for the words that are like it, or with
        bins for those that lie in its bin."""
        x = x.to(self.vote.weight.dtype)
        return self.gain * self.vote(rotate(self.segments.content(x), -offset))

    def read(self, h: Tensor, x: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        """What `scores` are made of, from last states (…, D). Votes of what was read are part of
        what lm_head reads."""
        vote, h = self.votes(x, offset), self.spine.decoder.norm(h)
        if self.segments.bins is None:
            return (h + vote.to(h.dtype),)
        return h, vote, offset, self.segments.length(x)

    def scores(self, h: Tensor, *votes: Tensor) -> tuple[Tensor, Tensor | float]:
        """(…, V) logits in two parts: the language model's, and the votes of bins."""
        logits = self.spine.base.lm_head(h)
        return logits, self.segments.bins.votes(*votes).to(h.dtype) if votes else 0.0

    def logits(self, *read: Tensor) -> Tensor:
        """(…, V) logits, both parts together."""
        return torch.add(*self.scores(*read))

    def states(self, text: Chunk, x_BSD: Tensor, offset_BS: Tensor) -> Tensor:
        """(B, S, D) last states over a text, given the concepts that cover each next token."""
        inputs_BSD = self.inputs(text.embed_BTD, x_BSD, offset_BS)
        with adapter(self.spine.base, ADAPTER):
            return self.run(inputs_BSD, text.position_BT, text.valid_BT)

    def read_codes(self, x: Tensor) -> Tensor:
        """(…, G, D) normalised codes of concepts → (…, G, D) embeddings that stand for them: of the
        words that they are of, the g-th code of a concept of the g-th of its segment."""
        stage_G = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
        word = rotate(self.segments.content(x.float()), -stage_G)
        return self.scale * self.prefix(word.to(self.prefix.weight.dtype))

    def continuation_states(
        self, ids_BS: Tensor, x_BCGD: Tensor, coded_BC: Tensor, rate: float
    ) -> Tensor:
        """(B, T, D) normed states that predict each token of (B, 1 + T) texts with their BOS, given
        those before it and the codes of what came before them, each where the rate puts it."""
        embed_BTD, stages = self.spine.embed(ids_BS[:, :-1]), x_BCGD.shape[2]
        # From here on C counts codes.
        c_BCD = self.read_codes(x_BCGD).flatten(1, 2).to(embed_BTD.dtype)
        coded_BC, rate = coded_BC.repeat_interleave(stages, 1), rate * stages
        count_B1 = coded_BC.sum(1, keepdim=True)
        # The BOS stays first, an attention sink; the codes follow it, and the new words them.
        inputs_BKD = torch.cat([embed_BTD[:, :1], c_BCD, embed_BTD[:, 1:]], 1)
        valid_BK = F.pad(coded_BC, (1, embed_BTD.shape[1] - 1), value=True)
        order_K = torch.arange(valid_BK.shape[1], device=valid_BK.device)
        last = coded_BC.shape[1]
        position_BK = torch.where(
            order_K <= last,
            torch.round(order_K / rate),
            torch.round(count_B1 / rate) + order_K - last,
        ).long()
        with adapter(self.spine.base, ADAPTER):
            h_BKD = self.run(inputs_BKD, position_BK, valid_BK)
        # The first new token is predicted where the codes end.
        first_B1D = h_BKD.take_along_dim(count_B1.unsqueeze(-1), 1)
        return self.spine.decoder.norm(torch.cat([first_B1D, h_BKD[:, last + 1 :]], 1))

    def write(self, x_BCD: Tensor, real_BC: Tensor, bos: int, width: int) -> list[list[int]]:
        """The token ids of the likeliest text of each row that a beam search of that width finds;
        cached. `real_BC`: False on padding."""
        length_BC = self.segments.length(x_BCD) * real_BC
        end_BC = length_BC.cumsum(1)
        start_BC = end_BC - length_BC
        cache = DynamicCache()

        def score(row_n, text_nS, parent_n):
            if width > 1:
                cache.batch_select_indices(parent_n)
            position_nS = torch.arange(text_nS.shape[1], device=row_n.device).expand(text_nS.shape)
            step_n1, row_n1 = position_nS[:, -1:], row_n[:, None]
            # After a row's end some concept at some offset, of which nothing is read.
            rank_n1 = (end_BC[row_n, :-1] <= step_n1).sum(1, keepdim=True)
            x_n1D = x_BCD[row_n1, rank_n1]
            offset_n1 = (step_n1 - start_BC[row_n1, rank_n1]).clamp(max=len(self.place.weight) - 1)
            inputs_n1D = self.inputs(self.spine.embed(text_nS[:, -1:]), x_n1D, offset_n1)
            h_n1D = self.run(inputs_n1D, position_nS, cache=cache)
            # A word that fits its bin after a wrong one is as good as any other there, but was not
            # to be predicted: votes are added to log p, not to what is normed over.
            logits_n1V, votes_n1V = self.scores(*self.read(h_n1D, x_n1D, offset_n1))
            return (logits_n1V.float().log_softmax(-1) + votes_n1V)[:, 0]

        with adapter(self.spine.base, ADAPTER):
            return beam_search(score, length_BC.sum(1), bos, width)
