"""The control: (B, T) ids → (B, T, V) logits of the base with LoRA alone, on the base's own
forward."""

import torch
from torch import Tensor, nn

from sememe.backbone.calling import cache_argument, check_places, parameters, take_cache
from sememe.backbone.split import SLIDING, Spine, causal_mask
from sememe.concepts.bridge import TailBridge
from sememe.concepts.masks import Lane, allow, segment_mask
from sememe.errors import RecipeError
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import ControlConfig
from sememe.models.writing import all_concepts


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
        self.bridge = (
            TailBridge(config.text_config.hidden_size) if config.skipped and config.bridge else None
        )
        if config.window is not None and SLIDING in Spine(self.backbone).kinds:
            raise RecipeError(
                f"system = window over a base of type {config.text_config.model_type}, which has a "
                "sliding window "
                "of its own: need one that sees everything. try: system=control"
            )
        if (
            config.skipped
            and len(self.backbone.get_decoder().layers) == config.text_config.num_hidden_layers
        ):
            self._skip(*config.skipped)
        self.finish()

    def _skip(self, first: int, last: int) -> None:
        decoder = self.backbone.get_decoder()
        # In a tuple, so that they are nobody's weights any more; the bridge is fitted to what they
        # did.
        self._taken_out = tuple(decoder.layers[first:last]), Spine(self.backbone).kinds[first:last]
        kept = [i for i in range(len(decoder.layers)) if not first <= i < last]
        decoder.layers = nn.ModuleList([decoder.layers[i] for i in kept])
        for index, layer in enumerate(decoder.layers):
            layer.self_attn.layer_idx = index
        text = self.config.text_config
        self.backbone.config = decoder.config = text = type(text).from_dict(text.to_dict())
        text.num_hidden_layers = len(kept)
        if getattr(text, "layer_types", None):
            text.layer_types = [text.layer_types[i] for i in kept]
        text._attn_implementation = self.config._attn_implementation
        if self.bridge is not None:
            decoder.layers[first].register_forward_pre_hook(self._cross, with_kwargs=True)

    def _cross(self, layer: nn.Module, arguments: tuple, named: dict):
        """The first deep layer reads bridged states; the first token, an attention sink, stays as
        it is."""
        h_BTD, *rest = arguments or (named.pop("hidden_states"),)
        sink_BT1 = (named["position_ids"] == 0).unsqueeze(-1)
        bridged_BTD = self.bridge(h_BTD, self.bridge.concept_mean.to(h_BTD.dtype))
        return (torch.where(sink_BT1, h_BTD, bridged_BTD), *rest), named

    @torch.no_grad()
    def start_bridge(self, ids_NT: Tensor, tokens: int = 16384, batch: int = 4) -> dict[str, float]:
        """Least squares from the shallow states of (N, T) blocks of text to those that the layers
        taken out made of them."""
        spine, (layers, kinds), first = (
            Spine(self.backbone),
            self._taken_out,
            self.config.skipped[0],
        )
        attention, states, targets = self.config._attn_implementation, [], []
        layers = [layer.to(self.device) for layer in layers]
        for ids_BT in ids_NT[: max(1, tokens // ids_NT.shape[1])].to(self.device).split(batch):
            h_BTD = spine.embed(ids_BT)
            place_BT = torch.arange(ids_BT.shape[1], device=self.device).expand_as(ids_BT)
            rope = spine.rope(h_BTD, place_BT)

            def mask(window: int | None, place_BT: Tensor = place_BT) -> Tensor | None:
                return causal_mask(place_BT, window, attention)

            h_BTD = spine.run(0, first, h_BTD, place_BT, rope, mask)
            target_BTD = spine.run_layers(layers, kinds, h_BTD, place_BT, rope, mask)
            states.append(h_BTD[:, 1:].flatten(0, 1).float())
            targets.append(target_BTD[:, 1:].flatten(0, 1).float())
        h_ND = torch.cat(states)
        return {
            "bridge_explains": self.bridge.start(h_ND, torch.zeros_like(h_ND), torch.cat(targets))
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
        """As the base's own forward. Its arguments are named because `generate` and the Trainer
        look for them.

        Raises:
            ValueError: an argument that the base does not know; a window over tokens that do not go
                on from the cache."""
        cache = take_cache(cache, kwargs)
        self.refuse_unknown(kwargs, parameters(type(self.backbone)))
        if self.config.window is not None:
            tokens_BT = input_ids if input_ids is not None else inputs_embeds[..., 0]
            check_places(
                tokens_BT.shape[1],
                attention_mask,
                position_ids,
                0 if cache is None else cache.get_seq_length(),
            )
            attention_mask = self._recent(tokens_BT, attention_mask, cache)
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

    def _recent(self, tokens_BT: Tensor, mask_BS: Tensor | None, cache) -> Tensor:
        """(B, 1, T, S) in the kernel's form: which of the S tokens up to now the new ones see."""
        batch, length = tokens_BT.shape
        before = cache.get_seq_length() if cache is not None else 0
        valid_BS = tokens_BT.new_ones(batch, before + length) if mask_BS is None else mask_BS
        key = all_concepts((valid_BS.long().cumsum(1) - 1).clamp(min=0), valid_BS.bool())
        query = Lane(*(field[:, -length:] for field in key))
        return allow(
            segment_mask(query, key, recent=self.config.window),
            self.dtype,
            self.config._attn_implementation,
        )
