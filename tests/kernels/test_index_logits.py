import pytest
import torch

from kernels import naive
from kernels.inputs import close, implementations, index_cache
from vllm_dsv32.kernels import index_logits
from vllm_dsv32.layout import index_key_views

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


def filled_cache(generator: torch.Generator, num_blocks: int = 9, gap_nbytes: int = 0) -> torch.Tensor:
    cache = index_cache(num_blocks, 16, gap_nbytes=gap_nbytes)
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
    close(got, naive.index_logits(q, weights, cache, BLOCK_TABLE, ids, keys, width), rtol=1e-4, atol=1e-4)
    again = kernel(q, weights, cache, BLOCK_TABLE, ids, keys, width)
    assert torch.equal(got, again)


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
    assert bool((got[0, 10:] == -torch.inf).all())


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
