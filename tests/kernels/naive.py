"""The operations once more, as loops in float64 that follow the equations and nothing else.

They share no code with the package, not even the cache layouts: bytes are read and written one token at a
time, at the offsets that the format states.
"""

import math
import struct

import torch

E4M3_MAX = 448.0


def e4m3_encode(x: float) -> int:
    """The byte of the nearest e4m3 value, ties to even, by search over all of them."""
    best = min(range(0x7F), key=lambda code: (abs(e4m3_decode(code) - abs(x)), code & 1))
    return best | (0x80 if math.copysign(1.0, x) < 0 else 0)


def e4m3_decode(byte: int) -> float:
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7f is NaN."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def rope(x: list[float], cos_sin: list[float], interleaved: bool) -> list[float]:
    half = len(x) // 2
    out = [0.0] * len(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        cos, sin = cos_sin[i], cos_sin[half + i]
        out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


def rms_norm(x: list[float], weight: list[float], eps: float) -> list[float]:
    mean = sum(v * v for v in x) / len(x)
    return [v / math.sqrt(mean + eps) * w for v, w in zip(x, weight, strict=True)]


def layer_norm(x: list[float], weight: list[float], bias: list[float], eps: float) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(variance + eps) * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def plain_scale(x: list[float]) -> float:
    return max(max(abs(v) for v in x), 1e-4) / E4M3_MAX


def power_of_two_scale(x: list[float]) -> float:
    wanted, scale = plain_scale(x), 1.0
    while scale < wanted:
        scale *= 2
    while scale / 2 >= wanted:
        scale /= 2
    return scale


def page_bytes(cache: torch.Tensor, block: int) -> bytes:
    """A block of a cache as it lies in memory."""
    return bytes(cache[block].contiguous().view(torch.uint8).flatten().tolist())


def latent_row(cache: torch.Tensor, slot: int) -> list[float]:
    """The 576 values of a slot, dequantised, as floats."""
    block_size = cache.shape[1]
    block, offset = divmod(slot, block_size)
    page = page_bytes(cache, block)
    if cache.dtype != torch.uint8:
        return cache[block, offset].double().tolist()
    row = page[offset * 656 : (offset + 1) * 656]
    scales = struct.unpack("<4f", row[512:528])
    nope = [e4m3_decode(row[i]) * scales[i // 128] for i in range(512)]
    return nope + [_bfloat16(row[528 + 2 * i : 530 + 2 * i]) for i in range(64)]


def index_key(cache: torch.Tensor, slot: int) -> list[float]:
    """The 128 values of an index key, dequantised: keys of a block first, then its scales."""
    block_size = cache.shape[1]
    block, offset = divmod(slot, block_size)
    page = page_bytes(cache, block)
    at = block_size * 128 + offset * 4
    (scale,) = struct.unpack("<f", page[at : at + 4])
    return [e4m3_decode(byte) * scale for byte in page[offset * 128 : (offset + 1) * 128]]


def _bfloat16(two_bytes: bytes) -> float:
    (value,) = struct.unpack("<f", b"\x00\x00" + two_bytes)
    return value


def index_logits(q, weights, cache, block_table, request_ids, num_keys, width) -> torch.Tensor:
    block_size = cache.shape[1]
    out = torch.full((len(q), width), -math.inf, dtype=torch.float64)
    for t in range(len(q)):
        table = block_table[request_ids[t]].tolist()
        for s in range(int(num_keys[t])):
            key = torch.tensor(
                index_key(cache, table[s // block_size] * block_size + s % block_size), dtype=torch.float64
            )
            total = 0.0
            for h in range(q.shape[1]):
                total += float(weights[t, h]) * max(0.0, float(q[t, h].double() @ key))
            out[t, s] = total
    return out


def topk(logits: torch.Tensor, num_keys: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k highest: lower positions first among equals, NaN as -inf; ascending, then -1."""
    rows = []
    for t in range(len(logits)):
        values = [-math.inf if math.isnan(v) else v for v in logits[t, : int(num_keys[t])].tolist()]
        best = sorted(range(len(values)), key=lambda s: (-values[s], s))[:k]
        rows.append(sorted(best) + [-1] * (k - len(best)))
    return torch.tensor(rows, dtype=torch.int32).reshape(len(logits), k)


def slots(topk_pos: torch.Tensor, request_ids: torch.Tensor, block_table: torch.Tensor, block_size: int):
    """Where positions of requests lie in a cache; -1 stays -1."""
    rows = []
    for positions, request in zip(topk_pos.tolist(), request_ids.tolist(), strict=True):
        blocks = block_table[request].tolist()
        rows.append([-1 if p < 0 else blocks[p // block_size] * block_size + p % block_size for p in positions])
    return torch.tensor(rows, dtype=torch.int32).reshape(topk_pos.shape)


def sparse_mla(q, cache, topk_slot, num_valid, scale) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.zeros(q.shape[0], q.shape[1], 512, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for t in range(q.shape[0]):
        slots = topk_slot[t, : int(num_valid[t])].tolist()
        if not slots:
            continue
        rows = torch.tensor([latent_row(cache, slot) for slot in slots], dtype=torch.float64)
        for h in range(q.shape[1]):
            scores = [float(q[t, h].double() @ row) * scale for row in rows]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            lse[t, h] = top + math.log(sum(weights))
            for weight, row in zip(weights, rows, strict=True):
                out[t, h] += weight / sum(weights) * row[:512]
    return out, lse
