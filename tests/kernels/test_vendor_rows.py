"""vLLM's own kernels behind the contracts of the operations; they run on a GPU with vLLM's wheel for CUDA only."""

from dataclasses import replace

import pytest
import torch

from kernels.inputs import PROBLEM, index_cache, latent_cache
from vllm_dsv32.kernels import index_logits, sparse_mla, topk_select
from vllm_dsv32.kernels.dispatch import KERNELS
from vllm_dsv32.layout import index_key_views, latent_fp8_views

TOPK = 2048


def vendor_row(operation, name, cache_format="auto"):
    if not torch.cuda.is_available():
        pytest.skip(f"{name} takes CUDA devices")
    problem = replace(
        PROBLEM,
        capability=torch.cuda.get_device_capability(),
        cache_format=cache_format,
        num_index_heads=64,
        topk=TOPK,
    )
    row = next(row for row in KERNELS if (row.operation, row.name) == (operation, name))
    refusal = row.refuse(problem)
    if refusal is not None:
        pytest.skip(f"{name} {refusal}")
    return row.load()


def filled_latent_cache(cache_format, block_size, num_blocks, generator):
    cache = latent_cache(num_blocks, block_size, cache_format)
    if cache_format != "fp8_ds_mla":
        return cache.copy_(torch.randn(cache.shape, generator=generator)).cuda()
    views = latent_fp8_views(cache)
    views.nope_fp8.copy_(torch.randn(views.nope_fp8.shape, generator=generator).to(torch.float8_e4m3fn))
    views.nope_scale.copy_(torch.tensor([0.1, 1.0, 0.03, 0.5]).expand(views.nope_scale.shape))
    views.rope.copy_(torch.randn(views.rope.shape, generator=generator))
    return cache.cuda()


@pytest.mark.parametrize("num_heads", [16, 64, 128])
@pytest.mark.parametrize(
    ("name", "cache_format", "block_size"),
    [("flash_mla", "fp8_ds_mla", 64), ("flash_mla", "fp8_ds_mla", 128), ("flash_attn3", "bfloat16", 16)],
)
def test_sparse_mla(generator, name, cache_format, block_size, num_heads):
    """Slots past the count are stale, and one token has none at all."""
    kernel = vendor_row("sparse_mla", name, "auto" if cache_format == "bfloat16" else cache_format)
    num_valid = [0, 1, 63, 64, 2000, TOPK]
    num_slots = 4096
    cache = filled_latent_cache(cache_format, block_size, num_slots // block_size, generator)
    q = torch.randn(len(num_valid), num_heads, 576, generator=generator).bfloat16().cuda()
    slots = torch.stack([torch.randperm(num_slots, generator=generator)[:TOPK] for _ in num_valid]).int().cuda()
    valid = torch.tensor(num_valid, dtype=torch.int32, device="cuda")
    out, lse = kernel(q, cache, slots, valid, 0.05)
    wanted, wanted_lse = sparse_mla.reference(q, cache, slots, valid, 0.05)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
        wanted.shape,
        wanted.dtype,
        wanted_lse.shape,
        torch.float32,
    )
    assert bool((out[0] == 0).all())
    assert bool((lse[0] == -torch.inf).all())
    torch.testing.assert_close(lse[1:], wanted_lse[1:], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(out.float(), wanted.float(), rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_flash_attn3_with_gaps_between_blocks(generator):
    kernel = vendor_row("sparse_mla", "flash_attn3")
    dense = filled_latent_cache("bfloat16", 16, 128, generator)
    cache = torch.full((128, 20, 576), torch.nan, dtype=torch.bfloat16, device="cuda")[:, :16].copy_(dense)
    q = torch.randn(2, 16, 576, generator=generator).bfloat16().cuda()
    slots = torch.randint(2048, (2, TOPK), generator=generator).int().cuda()
    valid = torch.tensor([TOPK, 100], dtype=torch.int32, device="cuda")
    for got, wanted in zip(kernel(q, cache, slots, valid, 0.05), kernel(q, dense, slots, valid, 0.05), strict=True):
        torch.testing.assert_close(got, wanted)


def test_flash_mla_refuses_small_blocks():
    kernel = vendor_row("sparse_mla", "flash_mla", "fp8_ds_mla")
    cache = latent_cache(2, 16, "fp8_ds_mla").cuda()
    slots = torch.zeros(1, TOPK, dtype=torch.int32, device="cuda")
    q = torch.zeros(1, 16, 576, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match=r"expected a cache with blocks of 64 tokens, .* got blocks of 16"):
        kernel(q, cache, slots, slots[:, 0], 0.05)


LAYOUTS = {
    "decode": [(0, 1), (900, 1), (3000, 1), (64, 1)],
    "speculative decode": [(900, 3), (64, 3), (2900, 3)],
    "prefill of one request": [(3000, 500)],
    "chunked prefill beside decode": [(900, 1), (0, 40), (3000, 300)],
}
"""Of each request the keys that its last row sees, and its rows."""


@pytest.mark.parametrize("requests", LAYOUTS.values(), ids=LAYOUTS)
def test_index_logits(generator, requests):
    kernel = vendor_row("index_logits", "deep_gemm")
    cache = index_cache(200, 64)
    views = index_key_views(cache)
    views.key_fp8.copy_(torch.randn(views.key_fp8.shape, generator=generator).to(torch.float8_e4m3fn))
    views.key_scale.copy_(2.0 ** torch.randint(-3, 3, views.key_scale.shape, generator=generator))
    cache = cache.cuda()
    num_keys = torch.cat([torch.arange(keys - rows + 1, keys + 1).clamp(min=0) for keys, rows in requests])
    ids = torch.cat([torch.full((rows,), request) for request, (_, rows) in enumerate(requests)])
    num_keys, ids = num_keys.int().cuda(), ids.int().cuda()
    table = torch.stack([torch.randperm(200, generator=generator)[:50] for _ in requests]).int().cuda()
    q = torch.randn(len(ids), 64, 128, generator=generator).to(torch.float8_e4m3fn).cuda()
    weights = torch.randn(len(ids), 64, generator=generator).cuda()
    got = kernel(q, weights, cache, table, ids, num_keys, 3100)
    wanted = index_logits.reference(q, weights, cache, table, ids, num_keys, 3100)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    visible = torch.arange(3100, device="cuda") < num_keys.unsqueeze(1)
    # DeepGEMM's own measure: its sums over heads cancel in float32.
    x, y = got[visible].double(), wanted[visible].double()
    assert 1 - 2 * (x * y).sum() / (x.square() + y.square()).sum() < 5e-6


def test_deep_gemm_refuses_other_blocks():
    kernel = vendor_row("index_logits", "deep_gemm")
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    q = torch.zeros(1, 64, 128, device="cuda").to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="expected a cache with blocks of 64 tokens, got 16"):
        kernel(q, q[..., 0].float(), index_cache(2, 16).cuda(), one.unsqueeze(0), one - 1, one, 16)


@pytest.mark.parametrize("num_rows", [1, 64, 65, 600])
def test_topk_select(generator, num_rows):
    """Without ties the set is the reference's; what lies past a row's keys would be selected at once.

    The pages of the two requests lie in orders of their own.
    """
    kernel = vendor_row("topk_select", "vllm")
    num_keys = torch.tensor([0, 1, 2047, 2048, 2049, 40_000, 9000])[torch.arange(num_rows) % 7 - 2]
    logits = torch.randn(num_rows, 40_000, generator=generator)
    logits[torch.arange(40_000) >= num_keys.unsqueeze(1)] = torch.inf
    logits, num_keys = logits.cuda(), num_keys.int().cuda()
    got, wanted = (torch.empty(num_rows, TOPK, dtype=torch.int32, device="cuda") for _ in range(2))
    request_ids = (torch.arange(num_rows) % 2).int().cuda()
    table = torch.stack([torch.randperm(625, generator=generator) for _ in range(2)]).int().cuda()
    for select in (kernel, topk_select.reference):
        select(logits, num_keys, request_ids, table, 64, got if select is kernel else wanted)
    assert torch.equal(got >= 0, wanted >= 0)  # the valid ones first
    assert torch.equal(got.sort(1).values, wanted.sort(1).values)
