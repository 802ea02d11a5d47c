"""The operations of a training step, and its memory, without computing it: a model of the meta
device runs forward and backward on fake tensors (torch's own, which have shapes alone), and each
operation says what it multiplies and moves."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Operation(NamedTuple):
    """`flops` of matrix products and attention; `bytes` read and written; `width` of its numbers in
    bytes."""

    flops: int
    bytes: int
    width: int


class Recorder(TorchDispatchMode):
    """Notes every operation inside its `with`, and the largest sum of the storages that are alive,
    `held` ones from the start."""

    def __init__(self, held: list[Tensor]):
        super().__init__()
        self.operations: list[Operation] = []
        self.alive: dict[int, int] = {}
        self.bytes = self.peak = 0
        self._hold(held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace != "aten" or func.is_view:
            self._hold(_tensors(out))
            return out
        outputs = _tensors(out)
        moved = _tensors((args, kwargs)) + outputs
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        width = min((x.element_size() for x in outputs if x.is_floating_point()), default=4)
        self.operations.append(Operation(flops, sum(map(_bytes, moved)), width))
        self._hold(outputs)
        return out

    def _hold(self, tensors: list[Tensor]) -> None:
        for storage in (x.untyped_storage() for x in tensors):
            key = storage._cdata
            if key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.bytes += self.alive[key]
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.bytes)

    def _free(self, key: int) -> None:
        self.bytes -= self.alive.pop(key)


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def materialise(model: nn.Module) -> None:
    """Gives a model of the meta device weights of the present mode's CPU; shared ones stay so."""
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in copies:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_parameter = isinstance(old, nn.Parameter)
                    copies[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                tensors[name] = copies[id(old)]


def record(
    build: Callable[[], nn.Module],
    forward: Callable[[nn.Module, Tensor], Tensor],
    shape,
    bf16: bool,
) -> Recorder:
    """One training step of the model that `build` makes, over (B, T) tokens: `forward` gives its
    loss. `bf16`: under autocast."""
    with torch.device("meta"):
        model = build().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise(model)
        ids_BT = torch.zeros(shape, dtype=torch.long)
        recorder = Recorder([*model.parameters(), *model.buffers()])
        with recorder:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = forward(model, ids_BT)
            loss.backward()
    return recorder
