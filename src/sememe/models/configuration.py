"""Model configurations: a base's own configuration, how it was adapted, and what the concepts
need."""

from transformers import AutoConfig, PreTrainedConfig

from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.fit import HIDDEN
from sememe.concepts.plan import PlanShape
from sememe.errors import CheckpointError, RecipeError
from sememe.keys import (
    CompressorOptions,
    OnlineOptions,
    Options,
    Plan,
    check_rate,
    split_layers,
)
from sememe.options import checked

# Options of earlier releases, and the value at which a saved model is what it was.
REMOVED = {
    "estimator": "soft",
    "commitment_weight": 0.0,
    "usage_weight": 0.0,
    "shared_map": False,
    "gate_noise": 0.0,
    "overlap": False,
}


class AdaptedConfig(PreTrainedConfig):
    """What every system shares: the base inside (`text_config`), its name and hash, and the LoRA on
    it.

    Args:
        text_config: configuration of the base, or its dict.
        base: known base, local folder or Hub id that the weights come from; None once merged.
        base_sha256: hash of the base's safetensors files; loading over another base is refused.
        base_bits: of a weight of the base's layers, 8 or 4; None for those of its dtype.
        lora_rank, lora_alpha, lora_dropout: LoRA on all linears of the decoder layers; rank 0 for
            none.
        lora_first: first layer that has it."""

    model_type = "sememe"
    sub_configs = {"text_config": AutoConfig}
    system = None
    writes_concepts = False
    opens_with_bos = False  # a BOS ahead of each text takes one position
    options = Options  # the group of recipe keys that its own are among, and are checked by
    names = {}  # option of that group → its name in the configuration
    before = {}  # options that came later, and what models saved before them are
    defaults = {
        "base": None,
        "base_sha256": None,
        "base_bits": None,
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "lora_first": 0,
    }

    def __init__(self, text_config=None, **options):
        for key, neutral in REMOVED.items():
            if (value := options.pop(key, neutral)) != neutral:
                raise CheckpointError(
                    f"{key} = {value!r} in the configuration of this model: need {neutral!r}, the "
                    "option is no more. try: an earlier release of sememe, or train it again"
                )
        if "architectures" in options:  # as in saved ones alone
            options = self.before | options
        own = {key: options.pop(name) for key, name in self.names.items() if name in options}
        values = checked(self.options, own).model_dump(mode="json")
        for key, name in self.names.items():
            setattr(self, name, values[key])
        for key, value in self.defaults.items():
            setattr(self, key, options.pop(key, value))
        super().__init__(**options)
        if not isinstance(text_config, PreTrainedConfig):
            text_config = AutoConfig.for_model(**(text_config or {"model_type": "llama"}))
        self.adopt(text_config)

    def adopt(self, text_config) -> None:
        """Takes over the base's configuration, and what transformers looks for at the top."""
        self.text_config = text_config
        text_config._name_or_path = ""  # a folder of this machine; the base is named in `base`
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(text_config, name, None))
        self.tie_word_embeddings = getattr(text_config, "tie_word_embeddings", False)

    def attention_widths(self) -> tuple[int, int]:
        """Numbers that a layer of the base makes a token's query of, and its key."""
        base = self.text_config
        heads = base.num_attention_heads
        head_dim = getattr(base, "head_dim", None) or base.hidden_size // heads
        return head_dim * heads, head_dim * (getattr(base, "num_key_value_heads", None) or heads)

    def layer_rows(self) -> int:
        """Rows of weights in a layer of the base, each as long as a state is wide."""
        return 2 * sum(self.attention_widths()) + 3 * self.text_config.intermediate_size

    def cache_share(self, length: int, rate: float | None = None) -> float:
        """Keys and values at the end of a text of so many tokens over the base's, of a system that
        says what its `slices` are."""
        held = sum(layers * keys for layers, keys, _ in self.slices(length, rate))
        return held / (self.text_config.num_hidden_layers * length)

    def check(self) -> None:
        """Raises RecipeError where a value does not fit the others, or the base."""


class ConceptConfig(AdaptedConfig):
    """What every system that writes concepts shares.

    Args:
        quantise: where the `Dial` stands at first, as `rate`.
        options: keys of `options`, see sememe/options.py."""

    model_type = "sememe-concepts"
    writes_concepts = True
    defaults = AdaptedConfig.defaults | {"quantise": 1.0}
    __init__ = AdaptedConfig.__init__  # transformers makes a dataclass of a class without one

    def check(self) -> None:
        """Raises RecipeError where a value does not fit the others, or the base."""
        check_rate(self.rate, self.max_tail)


class OnlineConfig(ConceptConfig):
    """Online concept compression (docs/online.md).

    Args:
        prefill_chunk: tokens that a cached forward takes at a time, so that no mask grows with
            their square; 0 for all.
        bridge_hidden: hidden units of the bridge for each coordinate of a state."""

    model_type = "sememe-online"
    system = "online"
    options = OnlineOptions
    names = {key: key for key in OnlineOptions.model_fields}
    defaults = ConceptConfig.defaults | {"prefill_chunk": 1024, "bridge_hidden": HIDDEN}
    __init__ = ConceptConfig.__init__
    before = {"segment": "none", "bridge_hidden": 0}

    def layer_share(self, rate: float | None = None) -> float:
        """Layer applications per token over the base's, at a realised rate. The bridge, and keys
        and values of the tails that concepts see in the middle slice, count by their share of a
        layer's weights."""
        rate = rate or self.rate
        shallow, middle, deep = self.split
        sees_tails = self.segment == "both"
        _, keys = self.attention_widths()
        of_bridge = 2 + 3 * self.bridge_hidden + sees_tails
        of_tail = middle * 2 * keys * sees_tails
        of_tail += of_bridge * self.bridge * self.text_config.hidden_size
        layers = shallow + middle * rate + deep + (1 - rate) * of_tail / self.layer_rows()
        return layers / sum(self.split)

    def slices(self, length: float, rate: float | None = None) -> list[tuple]:
        """(layers, the keys that each needs, the share of tokens that run it) at the end of a text
        of so many tokens, at a realised rate."""
        rate = rate or self.rate
        shallow, middle, deep = self.split
        concepts = length * rate
        tails = min(self.max_tail, length - concepts)
        seen = min((self.shallow_window or length) + 1, length)
        beside = concepts + tails * (self.segment == "both")
        return [(shallow, seen, 1), (middle, beside, rate), (deep, concepts + tails, 1)]

    def check(self) -> None:
        """Raises RecipeError where a value does not fit the others, or the base."""
        self.split = list(split_layers(self.split, self.text_config.num_hidden_layers))
        super().check()
        boundary = BOUNDARIES[self.boundary]
        if boundary.offline or (self.pool and boundary.accumulates):
            raise RecipeError(
                f"boundary = {self.boundary!r} reads what is still to come, or with pool = true a "
                "segment twice: need system: compressor for it, or no pool. try: boundary=null"
            )


class CompressorConfig(ConceptConfig):
    """Text → concepts → text (docs/compressor.md).

    Args:
        beams: texts that are kept beside each other while one is written from its concepts.
        bins_rate: rate that most codes of `bins` are for, wherever the dial stands; None for `rate`
            as it is now."""

    model_type = "sememe-compressor"
    system = "compressor"
    opens_with_bos = True
    options = CompressorOptions
    names = {key: key for key in CompressorOptions.model_fields}
    defaults = ConceptConfig.defaults | {"beams": 16, "bins_rate": None}

    def __init__(self, text_config=None, **options):
        super().__init__(text_config, **options)
        if self.bins_rate is None:
            self.bins_rate = self.rate

    def layer_share(self, rate: float | None = None) -> float:
        """Layer applications per token over the base's: the text is read once by one adapter and
        written once by the other, and an offline boundary adds a slot for each concept."""
        slots = (rate or self.rate) * BOUNDARIES[self.boundary].offline
        layers = self.text_config.num_hidden_layers
        return 1 + (1 + slots) * (self.depth or layers) / layers

    def check(self) -> None:
        """Raises RecipeError where a value does not fit the others, or the base."""
        super().check()
        # Of the coordinates of a state each length takes one; of the bins a code.
        longest = self.text_config.hidden_size // 2 - 1
        if self.content == "bins":
            longest = min(longest, self.num_concepts - 1)
        limits = {"depth": self.text_config.num_hidden_layers, "max_tail": longest}
        for key, limit in limits.items():
            if (getattr(self, key) or 0) > limit:
                raise RecipeError(
                    f"{key} = {getattr(self, key)}: over this base and its codes a compressor has "
                    f"at most {limit}. try: {key}={limit}"
                )


PLAN_KEYS = {
    "sizes": "plan_sizes",
    "lengths": "plan_lengths",
    "weight": "plan_weight",
    "dropout": "plan_dropout",
    "signals": "plan_signals",
    "parallel": "parallel",
    "multi_token": "multi_token",
    "straight_through": "straight_through",
}
"""Option of `Plan` → its name in the configuration."""


class PlannerConfig(AdaptedConfig):
    """Source → plan → text (docs/planner.md).

    Args:
        plan_max_source: tokens of the source that are read, its last ones; None for all.
        code_temperature: of the mixture that straight-through gradients are of.
        seed: of the new modules' start.
        options: those of `PLAN_KEYS`, see sememe/options.py."""

    model_type = "sememe-planner"
    system = "planner"
    options = Plan
    names = PLAN_KEYS
    defaults = AdaptedConfig.defaults | {
        "plan_max_source": None,
        "code_temperature": 1.0,
        "seed": 0,
    }

    __init__ = AdaptedConfig.__init__

    @property
    def plan_shape(self) -> PlanShape:
        return PlanShape(tuple(self.plan_sizes), tuple(self.plan_lengths))


class ControlConfig(AdaptedConfig):
    """The control: the base with the same LoRA and no concepts; with `skipped` or `left_out`,
    without those layers as well, with `window` with a short view.

    Args:
        skipped: [first, last) of the middle slice, which `skip` leaves out; empty for the others.
        left_out: layers that `prune` leaves out; empty for the others.
        bridge: a map in each gap (`models/pruning.py`).
        bridge_hidden: its hidden units for each coordinate of a state.
        window: tokens that a token sees in every layer, itself among them and the first one beside
            them; None for all."""

    model_type = "sememe-control"
    defaults = AdaptedConfig.defaults | {
        "skipped": (),
        "left_out": (),
        "bridge": False,
        "bridge_hidden": HIDDEN,
        "window": None,
    }
    __init__ = AdaptedConfig.__init__
    before = {"bridge_hidden": 0}

    @property
    def system(self) -> str:
        """Which of the baselines it is."""
        named = {"skip": self.skipped, "prune": self.left_out, "window": self.window}
        return next((name for name, value in named.items() if value), "control")

    @property
    def missing_layers(self) -> list[int]:
        """Those that are left out, by either name."""
        return [*self.left_out, *range(*self.skipped or (0,))]

    def layer_share(self, rate: float | None = None) -> float:
        """Layer applications per token over the base's; the maps in the gaps count by their share
        of a layer's weights."""
        missing = self.missing_layers
        gaps = sum(layer - 1 not in missing for layer in missing) * self.bridge
        of_map = (1 + 2 * self.bridge_hidden) * self.text_config.hidden_size / self.layer_rows()
        return 1 - (len(missing) - gaps * of_map) / self.text_config.num_hidden_layers

    def slices(self, length: float, rate: float | None = None) -> list[tuple]:
        """As those of an online model: all layers that are left, for every token."""
        layers = self.text_config.num_hidden_layers - len(self.missing_layers)
        return [(layers, min((self.window or length) + 1, length), 1)]


def sink_id(text_config) -> int:
    """What is read ahead of a text, by the base's configuration: an attention sink, and where the
    first token is predicted from."""
    for token in (text_config.bos_token_id, text_config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return 0
