"""What may be wrong with a file: one change of its bytes, its values, its lines or its tensors."""

import json
import random
import struct

import torch
import yaml

BIG = [2**31, 2**63, 2**64 - 1, 10**30, 9 * 10**18, -1, 0, 10**9]
ODD = [*BIG, 1.5, None, "", "x", [], {}, True, float("nan"), float("inf"), "x" * 10_000, "../../x"]
ODD += ["<script>", "${oc.env:HOME}", [1] * 1000, "[" * 1000, "\x00", "cuda:7", {"model_type": 3}]
DEEP = [b"[" * 100_000, b'{"a":' * 50_000, b"- " * 20_000]


def of_bytes(content: bytes, draw: random.Random) -> bytes:
    """One thing wrong with bytes of any kind."""
    data, at = bytearray(content), draw.randrange(len(content))
    end = min(len(data), at + draw.choice([1, 4, 8, 100]))
    kind = draw.randrange(7)
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        return content[:at]
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = draw.randbytes(end - at)
    elif kind == 4:
        data[at:at] = data[at:end] * draw.choice([1, 1000])
    elif kind == 5:
        data[at:at] = draw.choice(DEEP)
    else:
        data[at : at + 8] = struct.pack("<Q", draw.choice(BIG) % 2**64)
    return bytes(data)


def of_value(value, draw: random.Random):
    """Plain data with something in it replaced, renamed, left out or put in twice."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, changed = draw.choice(keys), value.copy()
        kind = draw.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1 and isinstance(value, dict):
            changed[draw.choice(["x", "", "../x", str(key) + "x"])] = changed.pop(key)
        elif kind == 1:
            changed.append(changed[key])
        else:
            changed[key] = of_value(value[key], draw)
        return changed
    return draw.choice(ODD)


def of_json(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return of_bytes(content, draw)
    value = json.loads(content)
    for _ in range(draw.randint(1, 2)):
        value = of_value(value, draw)
    return json.dumps(value).encode()


def of_yaml(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        text = draw.choice(
            ["\na: &a [x]\nb: *a\n", "\nx: !!python/object/apply:os.system ['x']\n", "\n? [1]\n"]
        )
        return draw.choice([of_bytes(content, draw), content + text.encode()])
    return yaml.safe_dump(of_value(yaml.safe_load(content), draw)).encode()


def of_lines(content: bytes, draw: random.Random) -> bytes:
    """One line of several of JSON."""
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    lines[at] = of_json(lines[at], draw) + b"\n"
    return b"".join(lines)


def of_tensors(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with something wrong in its header, its length or anywhere."""
    length = struct.unpack("<Q", content[:8])[0]
    if (kind := draw.randrange(4)) == 0:
        return of_bytes(content[: 8 + length], draw) + content[8 + length :]
    if kind == 1:
        return of_bytes(content, draw)
    header = json.loads(content[8 : 8 + length])
    if kind == 2:  # two tensors in one place
        one, other = draw.choices([name for name in header if name != "__metadata__"], k=2)
        header[one]["data_offsets"] = header[other]["data_offsets"]
    else:
        header = of_value(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def of_tensor(x: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Other numbers, of another kind or another shape."""
    kind = draw.randrange(6)
    if kind == 0:
        return (x + draw.choice([-1, 1, 2**40, 2**62])).to(x.dtype)
    if kind == 1:
        return x.to(draw.choice([torch.int8, torch.int64, torch.float64, torch.bool]))
    if kind == 2:
        return x[draw.randrange(3) :]
    if kind == 3:
        return torch.cat([x, x]) if x.dim() else x.repeat(2)
    if kind == 4:
        return x.flatten()
    return x * draw.choice([float("nan"), float("inf"), 0.0, -1.0])
