"""The control: (B, T) ids → (B, T, V) logits of the base with LoRA alone, on the base's own
forward."""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from sememe.backbone.calling import cache_argument, check_forward, parameters, take_cache
from sememe.backbone.split import SLIDING, Spine
from sememe.concepts.masks import Lane, Lanes
from sememe.errors import RecipeError
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import ControlConfig
from sememe.models.losses import loss_and_logits, too_many_logits
from sememe.models.pruning import GapMap, Scan, entering, removable, runs, show


class SkippedLayer(nn.Module):
    """In the place of a decoder layer: hands the states on, through the gap's map if there is
    one."""

    def __init__(self, bridge: GapMap | None):
        super().__init__()
        self._bridge = (bridge,)  # in a tuple, since it is a sub-module of the model already

    def forward(self, hidden_states: Tensor, position_ids: Tensor, cache=None, **kwargs) -> Tensor:
        """`cache` is named for those who look for it; there is nothing to keep."""
        (bridge,) = self._bridge
        return hidden_states if bridge is None else bridge(hidden_states, position_ids)


class ControlForCausalLM(AdaptedModel):
    """The same base and LoRA without concepts; with `config.left_out` (or `skipped`), without those
    layers too, and with `config.bridge` a map in each gap: the strongest baseline without
    concepts at that compute. With `config.window` every layer sees the last tokens and the first
    one alone (StreamingLLM, arXiv 2309.17453): the one at that cache.

    It runs transformers' own forward and cache, so that it is as fast as the base is; what a window
    shuts out stays cached."""

    config_class = ControlConfig
    # Of older releases' `skip`, whose one bridge had a part for concepts that was always 0.
    old_names = AdaptedModel.old_names | {
        r"^bridge\.concept.*": "",
        r"^bridge\.(?=[a-z])": "bridge.0.",
    }

    def __init__(self, config: ControlConfig, backbone=None):
        super().__init__(config, backbone)
        text_config = config.text_config
        if config.window is not None and SLIDING in Spine(self.backbone).kinds:
            raise RecipeError(
                f"system = window over a base of type {text_config.model_type}, which has a "
                "sliding window of its own: need one that sees everything. try: system=control"
            )
        self._whole = (self.backbone.get_decoder().layers,)  # in a tuple: not saved
        self._leave_out(config.missing_layers)
        self.finish()

    def prune(
        self,
        ids_NT: Tensor,
        wanted: list[int] | int,
        say: Callable[[str], None],
        progress: bool,
    ) -> dict[str, float]:
        """Leaves out the `wanted` layers, or so many as a scan of (N, T) blocks of training text
        chooses, and starts the maps. What that costs is said."""
        removable(Spine(self.backbone), wanted)
        scan = Scan(self.backbone, ids_NT)
        chosen = wanted if isinstance(wanted, list) else scan.choose(wanted, say, progress)
        say(
            f"start: layers {show(chosen)} left out; before any training that takes the loss on "
            f"training text from {scan.loss([]):.3f} to {scan.loss(chosen):.3f}"
        )
        self.leave_out(chosen)
        return self.start_bridge(ids_NT)

    def leave_out(self, layers: Iterable[int]) -> None:
        """Takes these layers out of a whole model. Raises RecipeError where one cannot go."""
        removable(Spine(self.backbone), layers)
        self.config.left_out, self.config.bridge = sorted(layers), True
        self._leave_out(layers)

    def _leave_out(self, missing: Collection[int]) -> None:
        layers, gaps = list(self._whole[0]), runs(missing)
        sizes = self.config.text_config.hidden_size, self.config.bridge_hidden
        self.bridge = nn.ModuleList(GapMap(*sizes) for _ in gaps if self.config.bridge)
        for number, (first, last) in enumerate(gaps):
            for index in range(first, last):
                maps = self.bridge if index == first else ()
                layers[index] = SkippedLayer(maps[number] if maps else None)
        self.backbone.get_decoder().layers = nn.ModuleList(layers)

    @torch.no_grad()
    def start_bridge(self, ids_NT: Tensor) -> dict[str, float]:
        """Fits from the states that enter each gap, of (N, T) blocks of text, to those that the
        base's own layers made of them."""
        decoder, gaps = self.backbone.get_decoder(), runs(self.config.missing_layers)
        pruned, decoder.layers = decoder.layers, self._whole[0].to(self.device)
        states = entering(
            self.backbone, ids_NT.to(self.device), {edge for gap in gaps for edge in gap}
        )
        decoder.layers = pruned
        return {
            f"map over layers {show(range(*gap))} explains": bridge.start(*map(states.get, gap))
            for bridge, gap in zip(self.bridge, gaps, strict=True)
        }

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """As the base's own forward, but that a training step has no logits where they would be
        too many to hold. Its arguments are named because `generate` and the Trainer look for them.

        Raises:
            ValueError: an argument that the base does not know; a window over tokens that do not go
                on from the cache."""
        cache = take_cache(cache, kwargs)
        self.refuse_unknown(kwargs, parameters(type(self.backbone)))
        if self.config.window is not None:
            tokens = inputs_embeds if input_ids is None else input_ids
            before = 0 if cache is None else cache.get_seq_length()
            check_forward(tokens.shape, attention_mask, position_ids, before)
            if attention_mask is None:
                attention_mask = tokens.new_ones(len(tokens), before + tokens.shape[1])
            attention_mask = self._window_mask(attention_mask, tokens.shape[1])
        text = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **cache_argument(self.backbone, cache),
        }
        head, trains = self.get_output_embeddings(), self.training and labels is not None
        if trains and too_many_logits(head, labels):
            states = self.backbone.get_decoder()(**text, use_cache=False).last_hidden_state
            return CausalLMOutputWithPast(loss_and_logits(self, states, labels, **kwargs)[0])
        return self.backbone(**text, labels=labels, logits_to_keep=logits_to_keep, **kwargs)

    def _window_mask(self, mask_BS: Tensor, length: int) -> Tensor:
        """(B, 1, T, S) in the kernel's form: which of the S tokens up to now the new ones see."""
        valid_BS = mask_BS.bool()
        key = Lane.causal(valid_BS.cumsum(1) - 1, valid_BS)
        query = Lane(*(field[:, -length:] for field in key))
        lanes = Lanes(query, key, plain=False, recent=self.config.window)
        return lanes.masks(self.config._attn_implementation, self.dtype)(None)
