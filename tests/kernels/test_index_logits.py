from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels import naive
from kernels.inputs import close, implementations, index_cache, on_device
from vllm_dsv32.kernels import index_logits, index_logits_triton
from vllm_dsv32.kernels.index_logits_triton import Tiling
from vllm_dsv32.layout import index_key_views

# Hopper's fp8 products are added with fewer bits than float32 has.
TOLERANCE = {"rtol": 1e-3, "atol": 2e-2} if torch.cuda.is_available() else {"rtol": 1e-4, "atol": 1e-4}

BATCHES = {
    "empty": ([], []),
    "one token": ([0], [1]),
    "decode": ([0, 1, 2], [33, 1, 16]),
    "prefill": ([0] * 5, [1, 2, 3, 4, 5]),
    "chunked prefill beside decode": ([0, 1, 1, 1, 2], [17, 30, 31, 32, 48]),
    "speculative decode": ([0, 0, 1, 1], [20, 21, 40, 41]),
    "zero lengths": ([0, 1, 2], [0, 0, 0]),
    "padding behind": ([0, 0, 2, 2], [4, 5, 0, 0]),
}
BLOCK_TABLE = torch.tensor([[4, 1, 7], [2, 0, 5], [8, 3, 6]], dtype=torch.int32)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors are NaN: a visible key that nobody scored does not pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def visible(logits: torch.Tensor, num_keys: torch.Tensor) -> torch.Tensor:
    """`logits`, with -inf in what the contract leaves open."""
    return logits.masked_fill(torch.arange(logits.shape[1]) >= num_keys.unsqueeze(1), -torch.inf)


def filled_cache(
    generator: torch.Generator, num_blocks: int = 9, block_size: int = 16, gap_nbytes: int = 0
) -> torch.Tensor:
    cache = index_cache(num_blocks, block_size, gap_nbytes=gap_nbytes)
    views = index_key_views(cache)
    views.key_fp8.copy_(torch.randn(views.key_fp8.shape, generator=generator).to(torch.float8_e4m3fn))
    views.key_scale.copy_(2.0 ** torch.randint(-3, 3, views.key_scale.shape, generator=generator))
    return cache


@pytest.mark.parametrize("width", [48, 61])
@pytest.mark.parametrize("gap_nbytes", [0, 128])
@pytest.mark.parametrize(("requests", "num_keys"), BATCHES.values(), ids=BATCHES)
@implementations("index_logits")
def test_scores_follow_the_equation(kernel, generator, requests, num_keys, gap_nbytes, width):
    cache = filled_cache(generator, gap_nbytes=gap_nbytes)
    q = torch.randn(len(requests), 3, 128, generator=generator).to(torch.float8_e4m3fn)
    weights = torch.randn(len(requests), 3, generator=generator)
    ids, keys = torch.tensor(requests, dtype=torch.int32), torch.tensor(num_keys, dtype=torch.int32)
    got = kernel(q, weights, cache, BLOCK_TABLE, ids, keys, width)
    assert (got.shape, got.dtype) == ((len(requests), width), torch.float32)
    got = visible(got, keys)
    close(got, naive.index_logits(q, weights, cache, BLOCK_TABLE, ids, keys, width), **TOLERANCE)
    again = kernel(q, weights, cache, BLOCK_TABLE, ids, keys, width)
    assert torch.equal(got, visible(again, keys))


@implementations("index_logits")
def test_keys_past_a_request_are_never_read(kernel, generator):
    """The block table's tail names blocks that do not exist; unwritten slots hold NaN."""
    cache = index_cache(2, 16)
    views = index_key_views(cache)
    views.key_fp8[0, :10].copy_(torch.randn(10, 128, generator=generator).to(torch.float8_e4m3fn))
    views.key_scale[0, :10] = 1.0
    table = torch.tensor([[0, 2**30]], dtype=torch.int32)
    q = torch.randn(1, 2, 128, generator=generator).to(torch.float8_e4m3fn)
    got = kernel(
        q,
        torch.ones(1, 2),
        cache,
        table,
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([10], dtype=torch.int32),
        32,
    )
    assert bool(got[0, :10].isfinite().all())


def test_the_relu_is_inside_the_sum(generator):
    """Two heads of opposite score: one survives; after the sum nothing would."""
    cache = index_cache(1, 16)
    views = index_key_views(cache)
    views.key_fp8.copy_(torch.ones(1, 16, 128).to(torch.float8_e4m3fn))
    views.key_scale.fill_(1.0)
    q = torch.stack((torch.ones(128), -torch.ones(128))).unsqueeze(0).to(torch.float8_e4m3fn)
    one = torch.ones(1, dtype=torch.int32)
    got = index_logits.reference(
        q, torch.tensor([[1.0, 2.0]]), cache, torch.zeros(1, 1, dtype=torch.int32), one - 1, one, 1
    )
    assert got.tolist() == [[128.0]]


def test_long_rows_are_scored_in_bounded_memory(generator, monkeypatch):
    cache = filled_cache(generator)
    q = torch.randn(6, 3, 128, generator=generator).to(torch.float8_e4m3fn)
    weights = torch.randn(6, 3, generator=generator)
    ids = torch.zeros(6, dtype=torch.int32)
    keys = torch.arange(40, 46, dtype=torch.int32)
    whole = index_logits.reference(q, weights, cache, BLOCK_TABLE, ids, keys, 48)
    monkeypatch.setattr(index_logits, "_WORKSPACE_NBYTES", 1)
    assert torch.allclose(index_logits.reference(q, weights, cache, BLOCK_TABLE, ids, keys, 48), whole, atol=1e-5)


TILINGS = {
    "decode": Tiling(1, 32, num_programs=1, keys_in_m=True, native_fp8=False, num_warps=4, num_stages=3),
    "decode, queries in rows": Tiling(1, 16, 16, keys_in_m=False, native_fp8=False, num_warps=4, num_stages=3),
    "prefill": Tiling(4, 64, 1, keys_in_m=True, native_fp8=False, num_warps=4, num_stages=3),
    "prefill, queries in rows": Tiling(2, 32, 8, keys_in_m=False, native_fp8=False, num_warps=4, num_stages=3),
    "prefill, native": Tiling(2, 64, 1, keys_in_m=True, native_fp8=True, num_warps=4, num_stages=3),
}
if torch.cuda.is_available():
    CAPABILITY = torch.cuda.get_device_capability()
    TILINGS = {name: tiles for name, tiles in TILINGS.items() if CAPABILITY >= (8, 9) or not tiles.native_fp8}
    TILINGS |= {f"{n} rows a request": index_logits_triton.tiling(CAPABILITY, 64, n) for n in (1, 2, 1024)}


@pytest.fixture(params=TILINGS.values(), ids=TILINGS)
def tiled(request, monkeypatch):
    def tiling(capability, num_heads, rows_per_request):
        return replace(request.param, num_rows=min(request.param.num_rows, 256 // num_heads))

    monkeypatch.setattr(index_logits_triton, "tiling", tiling)
    return on_device(index_logits_triton.index_logits)


# One row too many in front is cut off: the rows of a chunk begin anywhere in the batch.
MIXED = {
    "decode at the edges of tiles": (range(-1, 7), [9, 1, 16, 17, 32, 63, 64, 65]),
    "requests that share tiles of rows": ([0, 1, 0, 0, 0, 0, 2, 2, 2, 5], [9, 70, 30, 31, 32, 33, 1, 2, 3, 64]),
    "padding in front and behind": ([0, 0, 0, 1, 1, 2, 2], [9, 0, 0, 63, 64, 0, 0]),
}


@pytest.mark.parametrize("block_size", [16, 48, 64])
@pytest.mark.parametrize(("requests", "num_keys"), MIXED.values(), ids=MIXED)
def test_mixed_batches_in_any_tiling(tiled, generator, requests, num_keys, block_size):
    """Padding is NaN all over, and so is what lies in the cache behind a request's keys."""
    ids, keys = (torch.tensor(list(x), dtype=torch.int32)[1:] for x in (requests, num_keys))
    table = torch.full((10, 128 // block_size + 1), 2**30, dtype=torch.int32)
    written = torch.zeros(60, block_size, dtype=torch.bool)
    for request in range(10):
        seen = int(keys[ids == request].max()) if bool((ids == request).any()) else 0
        num_blocks = -(-seen // block_size)
        table[request, :num_blocks] = 59 - 6 * request - torch.arange(num_blocks)
        for pos in range(seen):
            written[table[request, pos // block_size], pos % block_size] = True
    cache = filled_cache(generator, 60, block_size, gap_nbytes=16)
    views = index_key_views(cache)
    views.key_fp8.view(torch.uint8)[~written] = 0x7F
    views.key_scale[~written] = torch.nan
    q = torch.randn(len(ids), 3, 128, generator=generator).to(torch.float8_e4m3fn)
    weights = torch.randn(len(ids), 3, generator=generator)
    q.view(torch.uint8)[keys == 0], weights[keys == 0] = 0x7F, torch.nan
    got = tiled(q, weights, cache, table, ids, keys, 75)
    close(visible(got, keys), index_logits.reference(q, weights, cache, table, ids, keys, 75), **TOLERANCE)


@pytest.mark.parametrize("num_heads", [8, 16, 32, 64, 128])
def test_head_counts(tiled, generator, num_heads):
    cache = filled_cache(generator)
    q = torch.randn(3, num_heads, 128, generator=generator).to(torch.float8_e4m3fn)
    weights = torch.randn(3, num_heads, generator=generator)
    ids, keys = torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([37, 38, 20], dtype=torch.int32)
    got = tiled(q, weights, cache, BLOCK_TABLE, ids, keys, 40)
    wanted = index_logits.reference(q, weights, cache, BLOCK_TABLE, ids, keys, 40)
    close(visible(got, keys), wanted, rtol=1e-3, atol=1e-3 * num_heads)


def test_every_byte_is_multiplied_exactly(tiled):
    """Of each key one value is not zero, so that no sum rounds."""
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()]
    q_values = torch.tensor([448.0, -3.25, 2.0**-6, -7 * 2.0**-9]).to(torch.float8_e4m3fn)
    cache = index_cache(4, 64, fill=0)
    views = index_key_views(cache)
    for slot, value in enumerate(values):
        views.key_fp8[slot // 64, slot % 64, 5] = value
    views.key_scale.fill_(1.0)
    q = torch.zeros(len(q_values), 1, 128).to(torch.float8_e4m3fn)
    q[:, 0, 5] = q_values
    ids, keys = torch.zeros(4, dtype=torch.int32), torch.full((4,), len(values), dtype=torch.int32)
    table = torch.arange(4, dtype=torch.int32).unsqueeze(0)
    got = tiled(q, torch.ones(4, 1), cache, table, ids, keys, len(values))
    assert torch.equal(got, (q_values.float().unsqueeze(1) * values.float()).relu())


@pytest.mark.parametrize("num_heads", [8, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_a_product_has_at_most_256_columns(capability, num_heads):
    for rows_per_request in (1, 2, 1024):
        num_rows = index_logits_triton.tiling(capability, num_heads, rows_per_request).num_rows
        assert num_rows in (1, 2, 4)
        assert num_rows * max(16, 1 << (num_heads - 1).bit_length()) <= 256
