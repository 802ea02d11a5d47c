"""Model configurations: a base's own configuration, how it was adapted, and what the concepts
need."""

from transformers import AutoConfig, PreTrainedConfig

from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.head import HEADS
from sememe.concepts.plan import PlanShape
from sememe.errors import CheckpointError, RecipeError

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
        lora_rank, lora_alpha, lora_dropout: LoRA on all linears of the decoder layers; rank 0 for
            none.
        lora_first: first layer that has it."""

    model_type = "sememe"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        base: str | None = None,
        base_sha256: str | None = None,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_first: int = 0,
        **kwargs,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.base, self.base_sha256 = base, base_sha256
        self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_first = (
            lora_rank,
            lora_alpha,
            lora_dropout,
            lora_first,
        )
        super().__init__(**kwargs)
        self.adopt(text_config if text_config is not None else AutoConfig.for_model("llama"))

    def adopt(self, text_config) -> None:
        """Takes over the base's configuration, and what transformers looks for at the top."""
        self.text_config = text_config
        text_config._name_or_path = ""  # a folder of this machine; the base is named in `base`
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(text_config, name, None))
        self.tie_word_embeddings = getattr(text_config, "tie_word_embeddings", False)


class ConceptConfig(AdaptedConfig):
    """What every system that writes concepts shares: where they are written, and their codes.

    Args:
        max_tail: longest run of normal tokens; then a concept is forced.
        num_concepts: size K of the codebook.
        codes_per_concept: stages G of the codebook: a concept is G digits of K, one integer below
            K^G.
        head: `joint` (one softmax over K + 1) or `nearest` (whether apart from which, which by
            distance).
        boundary: how segments close, see `concepts/boundary.py`.
        pool: codes are read from the mean of the segment's tail too (`concepts/pool.py`).
        concept_dropout: share of the coded concepts that carry nothing, in training.
        rate, quantise: where the `Dial` stands at first.
        code_temperature, gumbel: of the straight-through softmax in training; gumbel scales the
            noise, 0 for none."""

    model_type = "sememe-concepts"

    def __init__(
        self,
        text_config=None,
        rate: float = 0.25,
        max_tail: int = 16,
        num_concepts: int = 4096,
        head: str = "nearest",
        boundary: str = "null",
        quantise: float = 1.0,
        code_temperature: float = 1.0,
        gumbel: float = 0.0,
        concept_dropout: float = 0.0,
        codes_per_concept: int = 1,
        pool: bool = False,
        **kwargs,
    ):
        self.rate, self.max_tail, self.num_concepts, self.pool = rate, max_tail, num_concepts, pool
        self.codes_per_concept = codes_per_concept
        self.head, self.boundary, self.quantise = head, boundary, quantise
        self.code_temperature, self.gumbel = code_temperature, gumbel
        self.concept_dropout = concept_dropout
        for key, neutral in REMOVED.items():
            if (value := kwargs.pop(key, neutral)) != neutral:
                raise CheckpointError(
                    f"{key} = {value!r} in the configuration of this model: need {neutral!r}, the "
                    "option is no more. try: an earlier release of sememe, or train it again"
                )
        super().__init__(text_config=text_config, **kwargs)

    def check(self) -> None:
        """Raises RecipeError where a value cannot be run."""
        if not 0 < self.rate <= 1:
            raise RecipeError(
                f"rate = {self.rate}: need concepts per token in (0, 1]. try: rate=0.25"
            )
        if self.rate * (self.max_tail + 1) < 1 - 1e-9:
            raise RecipeError(
                f"max_tail = {self.max_tail} forces more than rate = {self.rate} concepts per "
                "token: need max_tail ≥ "
                f"{round(1 / self.rate) - 1}. try: max_tail={4 * round(1 / self.rate)}"
            )
        for name, value, known in (
            ("head", self.head, HEADS),
            ("boundary", self.boundary, BOUNDARIES),
        ):
            if value not in known:
                raise RecipeError(
                    f"{name} = {value!r}: need one of {', '.join(known)}. try: "
                    f"{name}={next(iter(known))}"
                )
        if self.num_concepts < 2:
            raise RecipeError(
                f"num_concepts = {self.num_concepts}: need at least 2. try: num_concepts=4096"
            )
        if self.codes_per_concept < 1 or self.num_concepts**self.codes_per_concept > 2**48:
            raise RecipeError(
                f"codes_per_concept = {self.codes_per_concept} of num_concepts = "
                f"{self.num_concepts}: need at least 1 and at "
                "most 48 bits per concept. try: codes_per_concept=2"
            )
        if self.pool and BOUNDARIES[self.boundary].accumulates:
            raise RecipeError(
                f"pool = true with boundary = {self.boundary!r}, which reads the whole segment "
                "already: need "
                "one of them. try: pool=false"
            )


class OnlineConfig(ConceptConfig):
    """Online concept compression (docs/concepts.md).

    Args:
        split: layers in the shallow, middle and deep slice.
        bridge: tail states get a linear guess of what the middle slice would have added
            (`concepts/bridge.py`).
        anchor: a concept starts from what its token alone tells; the codes say the rest
            (`concepts/anchor.py`).
        shallow_window: tokens that a token sees in the shallow slice, itself among them and the
            first one beside them; None for all. The shallow cache then stops growing.
        prefill_chunk: tokens that a cached forward takes at a time, so that no mask grows with
            their square; 0 for all."""

    model_type = "sememe-online"
    system = "online"

    def __init__(
        self,
        text_config=None,
        split=(4, 22, 4),
        bridge: bool = False,
        anchor: bool = False,
        shallow_window: int | None = None,
        prefill_chunk: int = 1024,
        **kwargs,
    ):
        self.split, self.bridge, self.anchor = list(split), bridge, anchor
        self.shallow_window, self.prefill_chunk = shallow_window, prefill_chunk
        super().__init__(text_config=text_config, **kwargs)

    def check(self) -> None:
        """Raises RecipeError where a value cannot be run."""
        check_split(self.split, self.text_config.num_hidden_layers)
        super().check()
        if BOUNDARIES[self.boundary].offline:
            raise RecipeError(
                f"boundary = {self.boundary!r} reads all of a text before it writes a concept, and "
                "an online model "
                "none of what is to come: need system: compressor for it. try: boundary=null"
            )
        if (self.shallow_window or 1) < 1 or self.prefill_chunk < 0:
            raise RecipeError(
                f"shallow_window = {self.shallow_window}, prefill_chunk = {self.prefill_chunk}: "
                "need at least 1 "
                "token, or none for no limit. try: shallow_window=256"
            )


CONTENTS = ("bins", "news")


class CompressorConfig(ConceptConfig):
    """Text → concepts → text (docs/concepts.md).

    Args:
        content: what codes stand for: `bins`, which of the words that the base takes for one
            another stand there (`concepts/bins.py`), or `news`, what the words' embeddings add to
            what is foretold (`concepts/news.py`).
        depth: layers that the compressor reads a text with; None for all.
        continuation_share: of the loss: going on from the concepts of a text's first half, instead
            of writing the text again.
        beams: texts that are kept beside each other while one is written from its concepts.
        bins_rate: rate that most codes of `bins` are for, wherever the dial stands; None for `rate`
            as it is now."""

    model_type = "sememe-compressor"
    system = "compressor"

    def __init__(
        self,
        text_config=None,
        depth: int | None = None,
        continuation_share: float = 0.0,
        content: str = "bins",
        beams: int = 16,
        bins_rate: float | None = None,
        **kwargs,
    ):
        self.depth, self.continuation_share, self.content, self.beams = (
            depth,
            continuation_share,
            content,
            beams,
        )
        super().__init__(text_config=text_config, **kwargs)
        self.bins_rate = self.rate if bins_rate is None else bins_rate

    def check(self) -> None:
        """Raises RecipeError where a value cannot be run."""
        super().check()
        layers = self.text_config.num_hidden_layers
        if not 1 <= (self.depth or layers) <= layers:
            raise RecipeError(
                f"depth = {self.depth}, but this base has {layers} layers: need 1 to {layers}. "
                f"try: depth={layers}"
            )
        width = self.text_config.hidden_size
        if 2 * (self.max_tail + 1) > width:
            raise RecipeError(
                f"max_tail = {self.max_tail}: of a compressor's {width} coordinates each length "
                "takes one, need at "
                f"most {width // 2 - 1}. try: max_tail={min(16, width // 2 - 1)}"
            )
        if self.content not in CONTENTS:
            raise RecipeError(
                f"content = {self.content!r}: need one of {', '.join(CONTENTS)}. try: "
                f"content={CONTENTS[0]}"
            )
        if self.content == "bins" and self.num_concepts <= self.max_tail:
            raise RecipeError(
                f"num_concepts = {self.num_concepts} with max_tail = {self.max_tail}: need a code "
                "for each length, "
                f"at least {self.max_tail + 1}. try: max_tail={self.num_concepts - 1}, or "
                "content=news"
            )
        if self.beams < 1:
            raise RecipeError(
                f"beams = {self.beams}: need at least 1, the likeliest word each time. try: "
                "beams=16"
            )
        if not 0 <= self.continuation_share <= 1:
            raise RecipeError(
                f"continuation_share = {self.continuation_share}: need a share of the loss in [0, "
                "1]. "
                "try: continuation_share=0.5"
            )


class PlannerConfig(AdaptedConfig):
    """Source → plan → text (`models/planner.py`).

    Args:
        plan_sizes: ids of each type of concept.
        plan_lengths: concepts of each type at most.
        parallel: types are written at the same time, each from the source alone; else one after
            another.
        multi_token: concepts that one step of the planner writes; 1 for one at a time.
        plan_max_source: tokens of the source that are read, its last ones; None for all.
        code_temperature: of the mixture that straight-through gradients are of.
        straight_through: what the executor reads passes its gradient on to the planner.
        plan_weight: of the plan's own cross entropy in the loss, nats per concept beside nats per
            target token.
        plan_dropout: share of the rows whose text is written without their plan, in training.
        plan_signals: of what linear probes of the plan lose on the signals of the text, in the
            loss; 0 for no probes.
        seed: of the new modules' start."""

    model_type = "sememe-planner"
    system = "planner"

    def __init__(
        self,
        text_config=None,
        plan_sizes=(512, 512),
        plan_lengths=(4, 8),
        parallel: bool = False,
        multi_token: int = 1,
        plan_max_source: int | None = None,
        code_temperature: float = 1.0,
        straight_through: bool = False,
        plan_weight: float = 1.0,
        plan_dropout: float = 0.0,
        plan_signals: float = 0.0,
        seed: int = 0,
        **kwargs,
    ):
        self.plan_sizes, self.plan_lengths = list(plan_sizes), list(plan_lengths)
        self.parallel, self.multi_token, self.plan_max_source = (
            parallel,
            multi_token,
            plan_max_source,
        )
        self.code_temperature, self.straight_through = code_temperature, straight_through
        self.plan_weight, self.plan_dropout, self.plan_signals, self.seed = (
            plan_weight,
            plan_dropout,
            plan_signals,
            seed,
        )
        super().__init__(text_config=text_config, **kwargs)

    @property
    def plan_shape(self) -> PlanShape:
        return PlanShape(tuple(self.plan_sizes), tuple(self.plan_lengths))

    def check(self) -> None:
        """Raises RecipeError where a value cannot be run."""
        sizes, lengths = self.plan_sizes, self.plan_lengths
        if not sizes or len(sizes) != len(lengths):
            raise RecipeError(
                f"plan_sizes = {sizes} and plan_lengths = {lengths}: need one of each for every "
                "type. "
                "try: plan_sizes=[512,512] plan_lengths=[4,8]"
            )
        if min(sizes) < 2 or min(lengths) < 1:
            raise RecipeError(
                f"plan_sizes = {sizes} and plan_lengths = {lengths}: need at least 2 ids and 1 "
                "concept in each type"
                ". try: plan_sizes=[512,512] plan_lengths=[4,8]"
            )
        if not 1 <= self.multi_token <= max(lengths):
            raise RecipeError(
                f"multi_token = {self.multi_token}: need 1 to {max(lengths)}, the concepts of the "
                "longest type. "
                "try: multi_token=1"
            )
        if self.plan_max_source is not None and self.plan_max_source < 1:
            raise RecipeError(
                f"plan_max_source = {self.plan_max_source}: need at least 1 token, or none for no "
                "limit. "
                "try: plan_max_source=512"
            )
        if self.code_temperature <= 0 or min(self.plan_weight, self.plan_signals) < 0:
            raise RecipeError(
                f"code_temperature = {self.code_temperature}, plan_weight = {self.plan_weight} and "
                "plan_signals = "
                f"{self.plan_signals}: need above 0, and at least 0. try: code_temperature=1 "
                "plan_weight=1"
            )


class ControlConfig(AdaptedConfig):
    """The control: the base with the same LoRA and no concepts; with `skipped`, without those
    layers as well, with `window` with a short view.

    Args:
        skipped: [first, last) layers taken out of the base ("skip the middle slice + LoRA"); empty
            for the control.
        bridge: a linear map in the place of those layers (`concepts/bridge.py`).
        window: tokens that a token sees in every layer, itself among them and the first one beside
            them; None for all."""

    model_type = "sememe-control"

    def __init__(
        self,
        text_config=None,
        skipped=(),
        bridge: bool = False,
        window: int | None = None,
        **kwargs,
    ):
        self.skipped, self.bridge, self.window = list(skipped), bridge, window
        super().__init__(text_config=text_config, **kwargs)

    @property
    def system(self) -> str:
        """Which of the baselines it is."""
        return "skip" if self.skipped else "control" if self.window is None else "window"


def sink_id(text_config) -> int:
    """What is read ahead of a text, by the base's configuration: an attention sink, and where the
    first token is predicted from."""
    found = next(
        (x for x in (text_config.bos_token_id, text_config.eos_token_id) if x is not None), 0
    )
    return found[0] if isinstance(found, list) else found


def check_split(split, layers: int) -> None:
    """Raises RecipeError unless the three slices fill the base's layers."""
    shallow, middle, deep = split
    if min(split) < 0 or shallow < 1 or deep < 1:
        raise RecipeError(
            f"split {shallow}/{middle}/{deep}: need at least 1 shallow and 1 deep layer. try: "
            "split.shallow=1 split.deep=1"
        )
    if sum(split) != layers:
        raise RecipeError(
            f"shallow + middle + deep = {sum(split)}, but this base has {layers} layers: need "
            f"{layers}. "
            f"try: split.middle={layers - shallow - deep}"
        )


def default_split(layers: int) -> tuple[int, int, int]:
    """A thick middle, which is where the gain is: 2/15 of the layers at each edge, as 4/22/4 of
    30."""
    edge = max(1, round(layers * 2 / 15))
    return edge, layers - 2 * edge, edge
