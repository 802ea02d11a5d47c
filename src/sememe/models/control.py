"""The control: (B, T) ids → (B, T, V) logits of the base with LoRA alone, on the base's own forward."""

from torch import nn

from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import ControlConfig


class ControlForCausalLM(AdaptedModel):
    """The same base and LoRA without concepts; with `config.skipped`, without the middle layers too.

    It runs transformers' own forward and cache, so that it is as fast as the base is.
    """

    config_class = ControlConfig

    def __init__(self, config: ControlConfig, backbone=None):
        super().__init__(config, backbone)
        if config.skipped and len(self.backbone.get_decoder().layers) == config.text_config.num_hidden_layers:
            self._skip(*config.skipped)
        self.finish()

    def _skip(self, first: int, last: int) -> None:
        decoder = self.backbone.get_decoder()
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

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, **kwargs):
        """As the base's own forward. Its arguments are named because `generate` and the Trainer look for them."""
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, labels=labels,
                             logits_to_keep=logits_to_keep, **kwargs)
