"""Several processes that train one model (torchrun); one alone where there are none."""

import os
import socket
from typing import Any

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"


def meet_on_this_machine() -> None:
    """Lets processes that are all on this machine meet where no other one can reach them. (By
    itself torch listens on all addresses, and takes pickles from whoever connects.) Nothing where
    torchrun itself listens for them, or where they are on several machines."""
    count = os.environ.get("WORLD_SIZE", "1")
    is_here = count == os.environ.get("LOCAL_WORLD_SIZE") != "1"
    if not is_here or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    size, rank, port = int(count), int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    first: dict[str, Any] = {"is_master": False}
    if rank == 0:
        server = socket.create_server((LOOPBACK, port))
        first = {"is_master": True, "master_listen_fd": server.detach()}
    store = dist.TCPStore(LOOPBACK, port, size, **first)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_of_process() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def gathered(parts: list[Any]) -> list[Any]:
    """The parts of all processes, by rank; every process has to call it."""
    if process_count() == 1:
        return parts
    everyone: list[list[Any]] = [[]] * process_count()
    dist.all_gather_object(everyone, parts)
    return [part for parts in everyone for part in parts]


def from_first(value: Any) -> Any:
    """The value that the first process has; every process has to call it."""
    values = [value]
    if process_count() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]
