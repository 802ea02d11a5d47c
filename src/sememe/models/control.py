"""The control: (B, T) ids → (B, T, V) logits of the base with LoRA alone, on the base's own
forward."""

import torch
from torch import Tensor, nn

from sememe.backbone.calling import cache_argument, check_forward, parameters, take_cache
from sememe.backbone.split import SLIDING, Spine
from sememe.concepts.bridge import TailBridge
from sememe.concepts.masks import Lane, Lanes
from sememe.errors import RecipeError
from sememe.models.adapted import AdaptedModel, fitted_blocks
from sememe.models.configuration import ControlConfig


class SkippedLayer(nn.Module):
    """In the place of a decoder layer: hands the states on, through the bridge if there is one. The
    first token, an attention sink, stays as it is."""

    def __init__(self, bridge: TailBridge | None):
        super().__init__()
        self._bridge = (bridge,)  # in a tuple, since it is a sub-module of the model already

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **kwargs) -> Tensor:
        (bridge,) = self._bridge
        if bridge is None:
            return hidden_states
        bridged_BTD = bridge(hidden_states, bridge.concept_mean.to(hidden_states.dtype))
        return bridged_BTD.where((position_ids != 0).unsqueeze(-1), hidden_states)


class ControlForCausalLM(AdaptedModel):
    """The same base and LoRA without concepts; with `config.skipped`, without the middle layers
    too, and with `config.bridge` a linear map in their place: the strongest baseline without
    concepts at that compute. With `config.window` every layer sees the last tokens and the first
    one alone (StreamingLLM, arXiv 2309.17453): the one at that cache.

    It runs transformers' own forward and cache, so that it is as fast as the base is; what a window
    shuts out stays cached."""

    config_class = ControlConfig

    def __init__(self, config: ControlConfig, backbone=None):
        super().__init__(config, backbone)
        text_config = config.text_config
        if config.window is not None and SLIDING in Spine(self.backbone).kinds:
            raise RecipeError(
                f"system = window over a base of type {text_config.model_type}, which has a "
                "sliding window of its own: need one that sees everything. try: system=control"
            )
        skipped = range(*(config.skipped or (0,)))
        self.bridge = TailBridge(text_config.hidden_size) if skipped and config.bridge else None
        decoder = self.backbone.get_decoder()
        self._whole = (decoder.layers,)  # in a tuple: not saved
        layers = list(decoder.layers)
        for index in skipped:
            layers[index] = SkippedLayer(self.bridge if index == skipped[0] else None)
        decoder.layers = nn.ModuleList(layers)
        self.finish()

    @torch.no_grad()
    def start_bridge(self, ids_NT: Tensor) -> dict[str, float]:
        """Least squares from the shallow states of (N, T) blocks of text to those that the skipped
        layers made of them."""
        decoder = self.backbone.get_decoder()

        def before_and_after(ids_BT: Tensor) -> Tensor:  # (2, n, D), without the sinks
            out = decoder(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
            states = torch.stack([out.hidden_states[layer] for layer in self.config.skipped])
            return states[:, :, 1:].flatten(1, 2).float()

        skipping = decoder.layers
        decoder.layers = self._whole[0].to(self.device)
        blocks_NT = fitted_blocks(ids_NT).to(self.device)
        h_ND, target_ND = torch.cat([before_and_after(ids) for ids in blocks_NT.split(4)], 1)
        decoder.layers = skipping
        return {"bridge_explains": self.bridge.start(h_ND, torch.zeros_like(h_ND), target_ND)}

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
        """As the base's own forward. Its arguments are named because `generate` and the Trainer
        look for them.

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
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **cache_argument(self.backbone, cache),
            **kwargs,
        )

    def _window_mask(self, mask_BS: Tensor, length: int) -> Tensor:
        """(B, 1, T, S) in the kernel's form: which of the S tokens up to now the new ones see."""
        valid_BS = mask_BS.bool()
        key = Lane.causal(valid_BS.cumsum(1) - 1, valid_BS)
        query = Lane(*(field[:, -length:] for field in key))
        lanes = Lanes(query, key, plain=False, recent=self.config.window)
        return lanes.masks(self.config._attn_implementation, self.dtype)(None)
