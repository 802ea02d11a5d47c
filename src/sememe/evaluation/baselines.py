"""What a text costs without loss, in bits per token: zstd and xz, and the base itself with an
arithmetic coder behind it."""

import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.data import TextBlocks

Tick = Callable[[int], None]


def xz(data: bytes) -> int:
    """Bytes of raw LZMA2 at its best for text. The file format around it would add 60 bytes and
    more to every window."""
    text = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=[text]))


def zstd(data: bytes) -> int:
    """Bytes at level 22 without magic number, size and checksum. Raises ImportError without the
    package zstandard."""
    import zstandard

    settings = zstandard.ZstdCompressionParameters.from_level(
        22,
        source_size=len(data),
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=False,
        write_checksum=False,
        write_dict_id=False,
    )
    return len(zstandard.ZstdCompressor(compression_params=settings).compress(data))


def classical(text: bytes, windows: Sequence[bytes], tokens: int) -> list[dict[str, Any]]:
    """Bits per token of a text of `tokens` tokens as one, and of its windows each alone; lines as
    `lossless` has them."""
    found = []
    for name, pack in (("zstd", zstd), ("xz", xz)):
        for of, parts in (("whole text", [text]), ("each window", windows)):
            line: dict[str, Any] = {"name": name, "of": of, "bits_per_token": None, "fault": None}
            try:
                line["bits_per_token"] = 8 * sum(map(pack, parts)) / tokens
            except ImportError:
                line["fault"] = "zstandard is not installed. try: pip install 'sememe[zstd]'"
            found.append(line)
    return found


@torch.no_grad()
def base_nll(
    base,
    bos: int,
    ids_NT: Tensor,
    last: int | None = None,
    batch: int = 4,
    tick: Tick = lambda n: None,
) -> Tensor:
    """(N, n) NLL in nats, on the host, of the last n of (N, T) tokens, all of them by default, with
    `bos` ahead."""
    last, found = last or ids_NT.shape[1], []
    for ids_BT in ids_NT.split(batch):
        ids_BT = ids_BT.to(base.device)
        ids_BS = F.pad(ids_BT, (1, 0), value=bos)
        logits_BnV = base(input_ids=ids_BS, use_cache=False, logits_to_keep=last + 1).logits[
            :, -last - 1 : -1
        ]
        nll = F.cross_entropy(
            logits_BnV.flatten(0, 1).float(), ids_BT[:, -last:].flatten(), reduction="none"
        )
        found.append(nll.view(len(ids_BT), -1).cpu())
        tick(ids_BT.numel())
    return torch.cat(found)


def lossless(
    base, bos: int, blocks: TextBlocks, batch: int = 4, tick: Tick = lambda n: None
) -> list[dict[str, Any]]:
    """The lossless costs of (N, T) windows as {name, of, bits_per_token, fault}; the base first: it
    reads each window alone."""
    bits = float(base_nll(base, bos, blocks.ids_NT, batch=batch, tick=tick).mean()) / math.log(2)
    return [
        {"name": "base", "of": "each window", "bits_per_token": bits, "fault": None},
        *classical(blocks.text, blocks.windows(), blocks.ids_NT.numel()),
    ]
