"""Latents and index keys: what lies in the caches, byte by byte."""

import pytest
import torch

from kernels import naive
from kernels.inputs import CACHE_FORMATS, close, cos_sin_cache, index_cache, latent_cache
from kernels.parts import EPS, implementations_of_part
from vllm_dsv32.kernels import index_insert, latent_insert
from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.layout import index_key_views, latent_fp8_views

SLOTS = {
    "empty": [],
    "one": [5],
    "scattered": [33, 2, 47, 16, 15, 31],
    "with padding": [3, -1, 18, -1],
    "all padding": [-1, -1, -1],
    "last slot of the last block": [47],
}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@implementations_of_part(Latents)
def test_latent_rows(kernel, generator, cache_format, slots):
    dtype = torch.float32 if cache_format == "float32" else torch.bfloat16
    kv_c = torch.randn(len(slots), 512, generator=generator).to(dtype)
    k_pe = torch.randn(len(slots), 64, generator=generator).to(dtype)
    weight = 1 + 0.1 * torch.randn(512, generator=generator)
    positions = torch.arange(len(slots)) * 37 % 300
    table = cos_sin_cache()
    cache = latent_cache(3, 16, cache_format)
    before = cache.clone()
    kernel(Latents(kv_c, k_pe, weight, EPS, torch.tensor(slots, dtype=torch.int64), cache), positions, table)
    for t, slot in enumerate(slots):
        if slot < 0:
            continue
        latent = naive.rms_norm(kv_c[t].double().tolist(), weight.double().tolist(), EPS)
        rope = naive.rope(k_pe[t].double().tolist(), table[positions[t]].double().tolist(), interleaved=True)
        got = naive.latent_row(cache, slot)
        if cache_format == "fp8_ds_mla":
            for begin in range(0, 512, 128):
                group = latent[begin : begin + 128]
                scale = naive.plain_scale(group)
                wanted = [naive.e4m3_decode(naive.e4m3_encode(v / scale)) * scale for v in group]
                # A value within rounding noise of the middle of two codes may take either.
                near = sum(abs(a - b) > 1e-5 for a, b in zip(got[begin : begin + 128], wanted, strict=True))
                assert near <= 1
            close(torch.tensor(got[512:]), torch.tensor(rope), rtol=2**-8, atol=1e-6)
        else:
            rtol = 1e-5 if cache_format == "float32" else 2**-8
            close(torch.tensor(got), torch.tensor(latent + rope), rtol=rtol, atol=1e-6)
    untouched = sorted(set(range(48)) - set(slots))
    flat, flat_before = (c.view(torch.uint8).reshape(48, -1) for c in (cache, before))
    assert torch.equal(flat[untouched], flat_before[untouched])


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("gap_nbytes", [0, 64])
@pytest.mark.parametrize("layout", RopeLayout)
@implementations_of_part(IndexKeys)
def test_index_keys(kernel, generator, layout, gap_nbytes, slots):
    index_k = torch.randn(len(slots), 128, generator=generator).bfloat16()
    weight = 1 + 0.1 * torch.randn(128, generator=generator)
    bias = 0.5 * torch.randn(128, generator=generator)
    positions = torch.arange(len(slots)) * 37 % 300
    table = cos_sin_cache()
    cache = index_cache(3, 16, gap_nbytes=gap_nbytes)
    slots_of_tokens = torch.tensor(slots, dtype=torch.int64)
    kernel(IndexKeys(index_k, weight, bias, EPS, slots_of_tokens, cache), positions, table, layout)
    for t, slot in enumerate(slots):
        if slot < 0:
            continue
        normed = naive.layer_norm(index_k[t].double().tolist(), weight.tolist(), bias.tolist(), EPS)
        cos_sin = table[positions[t]].double().tolist()
        wanted = naive.rope(normed[:64], cos_sin, layout is RopeLayout.INTERLEAVED) + normed[64:]
        scale = naive.power_of_two_scale(wanted)
        quantised = [naive.e4m3_decode(naive.e4m3_encode(v / scale)) * scale for v in wanted]
        got = naive.index_key(cache, slot)
        assert sum(abs(a - b) > 1e-5 for a, b in zip(got, quantised, strict=True)) <= 1
    for slot in set(range(48)) - set(slots):
        assert all(v != v for v in naive.index_key(cache, slot)), "a slot that no token has was written"
    if gap_nbytes:
        gap = cache.as_strided((3, gap_nbytes), (cache.stride(0), 1), 16 * 132)
        assert bool((gap == 0x7F).all()), "bytes between the pages were written"


@implementations_of_part(Latents)
def test_a_later_token_may_overwrite_a_slot(kernel, generator):
    cache = latent_cache(1, 16, "float32")
    weight, table = torch.ones(512), cos_sin_cache()
    for value in (1.0, 2.0):
        kv_c = torch.randn(1, 512, generator=generator) * value
        k_pe = torch.full((1, 64), value)
        kernel(Latents(kv_c, k_pe, weight, EPS, torch.tensor([4]), cache), torch.tensor([0]), table)
    assert cache[0, 4, 512:].tolist() == [2.0] * 64


def tokens(generator: torch.Generator, num_tokens: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and slots, every third token padding."""
    positions = torch.randint(0, 300, (num_tokens,), generator=generator)
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    return positions, slots.masked_fill(torch.arange(num_tokens) % 3 == 2, -1)


@pytest.mark.parametrize("num_tokens", [1, 7, 30])
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@implementations_of_part(Latents)
def test_latent_rows_are_the_references(kernel, generator, cache_format, num_tokens):
    dtype = torch.float32 if cache_format == "float32" else torch.bfloat16
    # Columns of a fused projection, NaN in what is padding.
    projected = torch.randn(num_tokens, 32 + 512 + 64, generator=generator).to(dtype)
    positions, slots = tokens(generator, num_tokens, 80)
    projected[slots < 0] = torch.nan
    _, kv_c, k_pe = projected.split([32, 512, 64], dim=-1)
    weight, table = 1 + 0.1 * torch.randn(512, generator=generator).to(dtype), cos_sin_cache()
    got, wanted, again = (latent_cache(5, 16, cache_format, gap_nbytes=128) for _ in range(3))
    for run, cache in ((kernel, got), (kernel, again), (latent_insert.reference, wanted)):
        run(Latents(kv_c, k_pe, weight, EPS, slots, cache), positions, table)
    assert torch.equal(got.view(torch.uint8), again.view(torch.uint8))
    if cache_format == "fp8_ds_mla":
        got_views, wanted_views = latent_fp8_views(got), latent_fp8_views(wanted)
        close(got_views.nope_scale, wanted_views.nope_scale, rtol=1e-6, atol=0)
        close(got_views.rope, wanted_views.rope, rtol=0, atol=0)
        # Sums in another order move a value by a bit, and so one in the middle of two codes to the other.
        differing = got_views.nope_fp8.view(torch.uint8) != wanted_views.nope_fp8.view(torch.uint8)
        assert differing.sum() <= differing.numel() // 10000
    else:
        close(got, wanted, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 21])
@pytest.mark.parametrize("layout", RopeLayout)
@implementations_of_part(IndexKeys)
def test_index_keys_are_the_references(kernel, generator, layout, num_tokens):
    positions, slots = tokens(generator, num_tokens, 80)
    index_k = torch.randn(num_tokens, 160, generator=generator).bfloat16()[:, 16:144]
    index_k[slots < 0] = torch.nan
    weight, bias = 1 + 0.1 * torch.randn(128, generator=generator), torch.randn(128, generator=generator)
    got, wanted, again = (index_cache(5, 16, gap_nbytes=128) for _ in range(3))
    for run, cache in ((kernel, got), (kernel, again), (index_insert.reference, wanted)):
        run(IndexKeys(index_k, weight, bias, EPS, slots, cache), positions, cos_sin_cache(), layout)
    assert torch.equal(got, again)
    got_views, wanted_views = index_key_views(got), index_key_views(wanted)
    close(got_views.key_scale, wanted_views.key_scale, rtol=0, atol=0)
    differing = got_views.key_fp8.view(torch.uint8) != wanted_views.key_fp8.view(torch.uint8)
    assert differing.sum() <= differing.numel() // 10000


@implementations_of_part(Latents)
def test_a_latent_that_is_nan_stays_nan(kernel, generator):
    kv_c, k_pe = torch.randn(2, 512, generator=generator), torch.randn(2, 64, generator=generator)
    kv_c[0, 300] = torch.nan
    cache = latent_cache(1, 16, "fp8_ds_mla", fill=0)
    positions = slots = torch.arange(2)
    kernel(Latents(kv_c, k_pe, torch.ones(512), EPS, slots, cache), positions, cos_sin_cache())
    assert all(v != v for v in naive.latent_row(cache, 0)[:512])
    assert all(v == v for v in naive.latent_row(cache, 1))


@implementations_of_part(IndexKeys)
def test_an_index_key_that_is_nan_stays_nan(kernel, generator):
    index_k = torch.randn(2, 128, generator=generator)
    index_k[0, 100] = torch.nan
    cache = index_cache(1, 16, fill=0)
    positions = slots = torch.arange(2)
    index_keys = IndexKeys(index_k, torch.ones(128), torch.zeros(128), EPS, slots, cache)
    kernel(index_keys, positions, cos_sin_cache(), RopeLayout.NEOX)
    assert all(v != v for v in naive.index_key(cache, 0))
    assert all(v == v for v in naive.index_key(cache, 1))


PAGE_NBYTES = 3 << 29
"""Two such pages lie beyond 2^31 bytes."""


@pytest.mark.parametrize("slot", [0, 37])
@implementations_of_part(Latents)
def test_latent_rows_beyond_two_gigabytes(kernel, generator, slot):
    kv_c, k_pe = torch.randn(1, 512, generator=generator), torch.randn(1, 64, generator=generator)
    cache = torch.empty(2 * PAGE_NBYTES + 16 * 656, dtype=torch.uint8)  # untouched, and so no memory
    cache = cache.as_strided((3, 16, 656), (PAGE_NBYTES, 656, 1))
    wanted = latent_cache(3, 16, "fp8_ds_mla")
    for run, into in ((kernel, cache), (latent_insert.reference, wanted)):
        latents = Latents(kv_c, k_pe, torch.ones(512), EPS, torch.tensor([slot]), into)
        run(latents, torch.tensor([5]), cos_sin_cache())
    got_row, wanted_row = (torch.tensor(naive.latent_row(c, slot)) for c in (cache, wanted))
    close(got_row, wanted_row, rtol=2**-3, atol=1e-3)


@pytest.mark.parametrize("slot", [0, 37])
@implementations_of_part(IndexKeys)
def test_index_keys_beyond_two_gigabytes(kernel, generator, slot):
    index_k = torch.randn(1, 128, generator=generator)
    cache = torch.empty(2 * PAGE_NBYTES + 16 * 132, dtype=torch.uint8)
    cache = cache.as_strided((3, 16, 132), (PAGE_NBYTES, 132, 1))
    wanted = index_cache(3, 16)
    for run, into in ((kernel, cache), (index_insert.reference, wanted)):
        index_keys = IndexKeys(index_k, torch.ones(128), torch.zeros(128), EPS, torch.tensor([slot]), into)
        run(index_keys, torch.tensor([5]), cos_sin_cache(), RopeLayout.NEOX)
    got_key, wanted_key = (torch.tensor(naive.index_key(c, slot)) for c in (cache, wanted))
    close(got_key, wanted_key, rtol=2**-3, atol=1e-3)
