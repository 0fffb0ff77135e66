"""Problems for the kernels of index_logits that take 64 heads alone, and how their results are judged."""

import pytest
import torch

from kernels.inputs import cuda_copy, index_cache
from vllm_dsv32.layout import index_key_views

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of SM 90"
)

# The tokens of a batch: request, how many, and the keys that the last of them sees.
EDGES = (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 1000)
BATCHES = {
    "one token, one key": [(0, 1, 1)],
    "lengths around tiles, steps and blocks": [(i, 1, n) for i, n in enumerate(EDGES)],
    "a prompt": [(0, 13, 13)],
    "a long prompt": [(0, 130, 1030)],
    "a chunk of a long prompt": [(0, 9, 20_001)],
    "all kinds": [(3, 1, 700), (0, 7, 300), (1, 2, 65), (2, 5, 5), (4, 1, 1), (6, 3, 129), (5, 66, 400)],
    "speculative decode": [(i, 2 + i % 3, 90 + 77 * i) for i in range(24)],
    "two tokens a request": [(i, 2, 130 + 500 * i) for i in range(7)],
    "four tokens a request": [(i, 4, 130 + 500 * i) for i in range(7)],
    "padding in front, between and behind": [(0, 3, 0), (1, 5, 170), (2, 2, 0), (3, 3, 64), (4, 2, 0)],
    "nothing to see": [(0, 3, 0), (1, 2, 0)],
}


def problem(batch, block_size=64, gap_nbytes=0, device="cuda"):
    """What is not written or must not be read is NaN, and blocks past a request's end are out of the cache."""
    torch.manual_seed(1)
    ids, keys = [], []
    for request, count, last in batch:
        ids += [request] * count
        keys += [max(0, last - count + 1 + i) for i in range(count)]
    num_requests, width = max(ids) + 1, max(keys) + 37
    num_blocks = num_requests * -(-width // block_size)
    cache = index_cache(num_blocks, block_size, gap_nbytes=gap_nbytes)
    if device == "cuda":
        cache = cuda_copy(cache)
    views = index_key_views(cache)
    table = torch.full((num_requests, -(-width // block_size)), 2**30, dtype=torch.int32)
    free = torch.randperm(num_blocks).tolist()
    for request in range(num_requests):
        seen = max((n for i, n in zip(ids, keys, strict=True) if i == request), default=0)
        for begin in range(0, seen, block_size):
            block = table[request, begin // block_size] = free.pop()
            filled = slice(min(block_size, seen - begin))
            written = views.key_fp8[block, filled]
            written.copy_(3 * torch.randn(written.shape, device=device))
            scales = views.key_scale[block, filled]
            scales.copy_(2.0 ** torch.randint(-3, 3, scales.shape))
    ids, keys = (torch.tensor(x, dtype=torch.int32, device=device) for x in (ids, keys))
    q = (3 * torch.randn(len(ids), 64, 128, device=device)).to(torch.float8_e4m3fn)
    weights = torch.randn(len(ids), 64, device=device)
    q.view(torch.uint8)[keys == 0], weights[keys == 0] = 0x7F, torch.nan
    return q, weights, cache, table.to(device), ids, keys, width


def assert_near(got, wanted, tolerance):
    """What is not finite, exactly; the rest to a part of the sum of magnitudes."""
    for sentinel in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(sentinel(got), sentinel(wanted))
    finite = wanted.isfinite()
    assert bool(((got - wanted).abs() <= tolerance)[finite].all())
