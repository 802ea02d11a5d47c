"""The frozen layers of a base in several processes (FSDP2, arXiv 2304.11277): each process holds a
part of every layer, and all of a layer while it runs.

What is trained is small and stands whole in each, under DDP, so that losses, optimizer and
checkpoints are those of any other run. So do the embeddings and lm_head, whose weights are read
apart from their modules."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel


def frozen(layer: nn.Module) -> list[nn.Parameter]:
    """The base's own weights, as they are now: whole, or a part."""
    return [p for p in layer.parameters() if not p.requires_grad]


def leave_to_shards(model: nn.Module, base: nn.Module) -> None:
    """Before DDP takes `model`, so that it keeps nothing of what `shard` will spread."""
    spread = set(map(id, frozen(base.get_decoder().layers)))
    names = [name for name, p in model.named_parameters() if id(p) in spread]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def shard(base: nn.Module) -> tuple[int, int]:
    """Spreads the frozen weights of the decoder layers over all processes. Returns their bytes in
    this process, and altogether."""
    layers = [layer for layer in base.get_decoder().layers if frozen(layer)]
    total = sum(p.nbytes for layer in layers for p in frozen(layer))
    # A group of its own: a process whose batch took another path may meet DDP's collectives sooner
    # or later than these.
    device = frozen(layers[0])[0].device.type
    mesh = DeviceMesh.from_group(dist.new_group(), device)
    for layer in layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    return sum(p.to_local().nbytes for layer in layers for p in frozen(layer)), total


@contextlib.contextmanager
def whole(base: nn.Module) -> Iterator[None]:
    """All of a sharded base in each process, which may go at its own pace meanwhile: a layer that
    one process runs more often than the others would wait for them. Every process has to come
    here. Nothing where it is not sharded."""
    layers = [layer for layer in base.get_decoder().layers if isinstance(layer, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()
