"""Shared by the systems: a frozen base with LoRA, saved as a few MB that name their base, or merged
whole."""

import copy
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel

from sememe.backbone.adapters import add_lora, merge_lora
from sememe.backbone.base_files import check_total, shapes_of
from sememe.backbone.bases import base_of, fingerprint, load_base
from sememe.backbone.bits import pack
from sememe.backbone.calling import FORWARD, name_cache, parameters, refuse_unknown
from sememe.backbone.exact import cast, computed_in, wide
from sememe.backbone.split import self_check
from sememe.concepts.masks import FLEX
from sememe.errors import CheckpointError
from sememe.models.configuration import sink_id
from sememe.storage import WEIGHTS, check_manifest, replacing, unwritable, write_manifest

# Options of transformers that are used, or that say nothing about a local folder of adapters; and
# those that ask for nothing with the value that transformers gives them.
LOADING = [
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "device_map",
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
    "adapter_kwargs",
    "trust_remote_code",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "token",
    "use_auth_token",
    "low_cpu_mem_usage",
    "use_safetensors",
    "weights_only",
]
SAVING = [
    "safe_serialization",
    "max_shard_size",
    "token",
    "save_peft_format",
    "save_original_format",
]
DEFAULTS = {
    "revision": "main",
    "subfolder": "",
    "ignore_mismatched_sizes": False,
    "output_loading_info": False,
    "push_to_hub": False,
    "use_kernels": False,
}


class AdaptedModel(PreTrainedModel, GenerationMixin):
    """A causal LM around `self.backbone`. Sub-classes add modules and `forward`."""

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    foldable = True  # LoRA can go into the base's own weights
    source_sha256: str | None = None  # of the files that it was loaded from, its base's among them
    _supports_sdpa = True
    _supports_attention_backend = True
    kernels = ("sdpa", "eager")
    old_names = {  # of weights, in models that older releases saved; "" for those that went
        r"^(head|codes|gate)\.": r"writer.\1.",
        r"^anchor\.": "writer.readout.anchor.",
        r"^pool\.weight$": "writer.readout.pool",
        r"^writer\.codes\.use$": "",
    }
    # The frame, the codes and whoever reads them, in whatever dtype the rest is loaded; the
    # bridge's weights multiply states.
    _keep_in_fp32_modules_strict = [r"^writer\.", "^bridge.+(mean|scale)$"]

    def __init__(self, config, backbone: PreTrainedModel | None = None):
        attention = config._attn_implementation or "sdpa"
        self.check_kernel(attention)
        config._attn_implementation = attention
        super().__init__(config)
        if backbone is None:
            # A nested live config loses its attention kernel: pass it on.
            backbone = AutoModelForCausalLM.from_config(
                config.text_config, attn_implementation=attention, trust_remote_code=False
            )
        self.backbone = backbone

    @classmethod
    def check_kernel(cls, attention: str) -> None:
        """Raises CheckpointError before a kernel that cannot take our masks is tried."""
        if attention not in cls.kernels:
            raise CheckpointError(
                f"attn_implementation = {attention!r}: need one of {', '.join(cls.kernels)}. try: "
                "sdpa"
            )

    def finish(self) -> None:
        """Last line of a sub-class's `__init__`. LoRA comes after `post_init`, which would draw its
        weights anew."""
        self.post_init()
        self.generation_config = self.backbone.generation_config
        if self.config.base is not None:
            self.add_adapters()

    def add_adapters(self) -> None:
        """LoRA as the configuration has it."""
        add_lora(self.backbone, self.config)

    def _init_weights(self, module) -> None:
        """New modules start from `start` (k-means) or from zero; the base brings its own
        weights."""

    @property
    def bos(self) -> int:
        """The token that every text begins with."""
        return sink_id(self.config.text_config)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return computed_in(self.backbone.get_decoder().norm)

    def refuse_unknown(self, named: dict, extra: Iterable[str] = ()) -> None:
        """Raises ValueError for what `forward` got and would ignore."""
        known = parameters(type(self)).union(FORWARD, extra)
        refuse_unknown(named, known, f"{type(self).__name__}.forward")

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        name_cache(model_kwargs)  # whatever the caller called it
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value) -> None:
        self.backbone.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, **kwargs):
        """As in transformers. Raises CheckpointError where the new rows would be lost, with the
        base, which is not saved."""
        rows = self.get_input_embeddings().num_embeddings
        resized = new_num_tokens not in (None, rows) or rows % (pad_to_multiple_of or 1)
        if resized and self.config.base is not None:
            raise CheckpointError(
                "new embedding rows would be the base's, and only adapters are saved: need the "
                f"{rows} of {self.config.base!r}. try: model.merged() first, or train over a base "
                "that was resized"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **kwargs)

    @classmethod
    def from_base(
        cls,
        config,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        folder: Path | None = None,
        saved: Path | None = None,
    ):
        """The base with fresh adapters. Fills in `text_config` and `base_sha256` of `config`.

        Args:
            folder: of the base; default: where the configuration says.
            saved: of adapters that are to be loaded, which have to be of this configuration.

        Raises:
            BaseError: the base cannot be had, or its layers cannot be called one by one.
            CheckpointError: `config` names the hash of another base, or is not that of `saved`."""
        cls.check_kernel(attention)
        folder = folder or base_of(config.base)
        sha256 = fingerprint(folder)
        if config.base_sha256 not in (None, sha256):
            raise CheckpointError(
                f"this model was trained on base {config.base!r} with sha256 "
                f"{config.base_sha256[:12]}…, but that in {folder} has {sha256[:12]}…: need the "
                "same weights. try: SEMEME_BASE=FOLDER with those"
            )
        checked = "sdpa" if attention == FLEX else attention  # flex has no CPU to check the base on
        # Checked before it is rounded: 16 bits alone make 1 % of difference in SmolLM2.
        backbone = load_base(folder, dtype=wide(dtype), attn_implementation=checked)
        cls.check_base(backbone, config)
        pack(backbone, config.base_bits)
        backbone.set_attn_implementation(attention)
        config.adopt(backbone.config)
        config.base_sha256 = sha256
        config._attn_implementation = attention
        if saved is not None:
            cls.check_saved(config, saved)
        return cls(config, backbone).cast(dtype)

    @classmethod
    def check_saved(cls, config, folder: Path) -> None:
        """Raises CheckpointError where the weights in `folder` are not those of the configuration,
        or BaseError where they are far fewer: before memory is taken for modules of its sizes."""
        shapes = shapes_of(folder / WEIGHTS)
        try:
            with torch.device("meta"):
                model = cls(copy.deepcopy(config))
        except RuntimeError:  # a number is worked out from weights: loading them will tell
            return
        if config.base is None:
            parameters = sum(p.numel() for p in model.parameters())
            check_total(folder, parameters, sum(map(math.prod, shapes.values())))
            return
        _check_fit(folder, cls.renamed(shapes), _shapes(model.own_state()))

    @classmethod
    def renamed(cls, state: dict[str, Any]) -> dict[str, Any]:
        """What an older release saved, under the names of this one."""
        for old, new in cls.old_names.items():
            state = {re.sub(old, new, name): value for name, value in state.items()}
        state.pop("", None)
        return state

    @classmethod
    def check_base(cls, backbone, config) -> None:
        """Raises BaseError where the model cannot be built over this base."""
        self_check(backbone)

    def exact_modules(self) -> Iterable[nn.Module]:
        """Parts of the base that `cast` leaves in fp32 where the rest has 16 bits."""
        return ()

    def cast(self, dtype: torch.dtype):
        """The model, in place: what multiplies states in a dtype; codes and buffers keep fp32."""
        cast(self, dtype, self.exact_modules())
        return self

    def own_state(self) -> dict[str, Tensor]:
        """What is not the base's: LoRA, new modules and their buffers."""
        return _own(self.state_dict())

    @torch.no_grad()
    def round_own_weights(self) -> None:
        """Rounds the matrices of LoRA and new modules to bf16 in place; they are then saved in it.
        Vectors and buffers stay as they are: a code's bias is near 100, where bf16 has steps of
        0.5."""
        for value in _own(dict(self.named_parameters())).values():
            if value.dim() > 1:
                value.copy_(value.bfloat16())

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, state_dict=None, **kwargs
    ) -> None:
        """Writes config, weights and, last, their manifest. An adapted model saves its own few MB;
        a merged one everything.

        Raises:
            ValueError: an option that would be ignored.
            SememeError: the folder cannot be written."""
        _refuse_unused(kwargs, SAVING, f"{type(self).__name__}.save_pretrained")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        config.architectures = [type(self).__name__]
        config.dtype = str(self.dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        state = dict(state_dict or self.state_dict())
        if config.base is not None:
            state = {name: _narrowed(value) for name, value in _own(state).items()}
        elif self.get_output_embeddings().weight is self.get_input_embeddings().weight:
            state.pop("backbone.lm_head.weight", None)
        state = {name: value.contiguous() for name, value in state.items()}
        try:
            with replacing(folder / WEIGHTS) as temporary:
                save_file(state, temporary, metadata={"format": "pt"})
            write_manifest(folder)
        except (OSError, SafetensorError) as error:
            raise unwritable(folder / WEIGHTS, error) from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Loads a saved folder: the adapters over their base, which is found by its name, or at
        $SEMEME_BASE, and checked by its hash.

        Args:
            dtype, attn_implementation, device_map: as in transformers; device_map takes one device.
                Keys of the configuration override it, as in transformers.

        Raises:
            ValueError: an option that would be ignored."""
        folder = Path(pretrained_model_name_or_path)
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(
                folder, return_unused_kwargs=True, **kwargs
            )
        sha256 = check_manifest(folder).get(WEIGHTS)
        # A dtype or its name; "auto" and None are no attributes of torch.
        dtype = str(kwargs.get("dtype") or kwargs.get("torch_dtype")).removeprefix("torch.")
        dtype = getattr(torch, dtype, torch.float32)
        if config.base is None:
            cls.check_saved(config, folder)
            if wide(dtype) != dtype:
                kwargs = {**kwargs, "dtype": wide(dtype), "torch_dtype": None}
            loaded = super().from_pretrained(
                folder,
                *args,
                config=config,
                key_mapping={old: new for old, new in cls.old_names.items() if new},
                **kwargs,
            )
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.source_sha256 = sha256
            if wide(dtype) != dtype:
                model.cast(dtype)
            return loaded
        _refuse_unused(kwargs, {*LOADING, *config.to_dict()}, f"{cls.__name__}.from_pretrained")
        attention = kwargs.get("attn_implementation") or config._attn_implementation or "sdpa"
        device = kwargs.get("device_map") or "cpu"
        device, *others = set(device.values()) if isinstance(device, dict) else [device]
        if others:
            raise CheckpointError(
                f"device_map over {device} and {others}: need one device for all of the model. "
                "try: device_map='cpu'"
            )
        model = cls.from_base(config, dtype, attention, saved=folder)
        model.load_own_state(folder)
        model.source_sha256 = f"{sha256}-{config.base_sha256}"
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.to(default_device() if device == "auto" else device).eval()

    def load_own_state(self, folder: Path) -> None:
        """Loads what `own_state` saved; every key must fit. Raises CheckpointError where one does
        not."""
        state = self.renamed(load_file(folder / WEIGHTS))
        _check_fit(folder, _shapes(state), _shapes(self.own_state()))
        self.load_state_dict(state, strict=False)

    def merged(self):
        """Folds LoRA into the base in place; the model then saves whole and needs no base. Raises
        CheckpointError where there is more than one adapter."""
        if not self.foldable:
            raise CheckpointError(
                f"the two adapters of a {self.config.system} cannot be folded into one base: need "
                "the model as it was saved. try: the run itself"
            )
        merge_lora(self.backbone)
        self.config.base = self.config.base_sha256 = self.config.base_bits = None
        self.config.lora_rank = 0
        return self


def _own(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach()
        for name, value in weights.items()
        if "lora_" in name or not name.startswith("backbone.")
    }


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def _check_fit(folder: Path, saved: dict[str, tuple], own: dict[str, tuple]) -> None:
    """Raises CheckpointError where saved weights are not those of a model, by name and shape."""
    if wrong := sorted(saved.items() ^ own.items()):
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit its configuration (first {wrong[0][0]}): need "
            "the config.json that was saved with it. try: the folder's own pair of files"
        )


def _narrowed(value: Tensor) -> Tensor:
    """In bf16 where that loses nothing, as after `round_own_weights`: half the file."""
    narrow = value.bfloat16()
    return narrow if value.dim() > 1 and torch.equal(narrow.to(value.dtype), value) else value


def _refuse_unused(named: dict, known: Iterable[str], what: str) -> None:
    """Raises ValueError for what is not `known` and has not the value that it has anyway."""
    named = {name: value for name, value in named.items() if DEFAULTS.get(name, ...) != value}
    refuse_unknown(named, known, what)


def default_device() -> str:
    """Where a model runs when nothing is said."""
    return "cuda" if torch.cuda.is_available() else "cpu"
