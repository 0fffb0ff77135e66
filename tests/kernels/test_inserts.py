"""latent_insert and index_insert: what lies in the cache, byte by byte."""

import pytest
import torch

from kernels import naive
from kernels.inputs import CACHE_FORMATS, close, cos_sin_cache, implementations, index_cache, latent_cache
from vllm_dsv32.kernels.rope import RopeLayout

SLOTS = {
    "empty": [],
    "one": [5],
    "scattered": [33, 2, 47, 16, 15, 31],
    "with padding": [3, -1, 18, -1],
    "all padding": [-1, -1, -1],
    "last slot of the last block": [47],
}
EPS = 1e-6


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@implementations("latent_insert")
def test_latent_rows(kernel, generator, cache_format, slots):
    dtype = torch.float32 if cache_format == "float32" else torch.bfloat16
    kv_c = torch.randn(len(slots), 512, generator=generator).to(dtype)
    k_pe = torch.randn(len(slots), 64, generator=generator).to(dtype)
    weight = 1 + 0.1 * torch.randn(512, generator=generator)
    positions = torch.arange(len(slots)) * 37 % 300
    table = cos_sin_cache()
    cache = latent_cache(3, 16, cache_format)
    before = cache.clone()
    kernel(kv_c, k_pe, weight, EPS, positions, table, torch.tensor(slots, dtype=torch.int64), cache)
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
@implementations("index_insert")
def test_index_keys(kernel, generator, layout, gap_nbytes, slots):
    index_k = torch.randn(len(slots), 128, generator=generator).bfloat16()
    weight = 1 + 0.1 * torch.randn(128, generator=generator)
    bias = 0.5 * torch.randn(128, generator=generator)
    positions = torch.arange(len(slots)) * 37 % 300
    table = cos_sin_cache()
    cache = index_cache(3, 16, gap_nbytes=gap_nbytes)
    kernel(index_k, weight, bias, EPS, positions, table, layout, torch.tensor(slots, dtype=torch.int64), cache)
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


@implementations("latent_insert")
def test_a_later_token_may_overwrite_a_slot(kernel, generator):
    cache = latent_cache(1, 16, "float32")
    weight, table = torch.ones(512), cos_sin_cache()
    for value in (1.0, 2.0):
        kv_c = torch.randn(1, 512, generator=generator) * value
        k_pe = torch.full((1, 64), value)
        kernel(kv_c, k_pe, weight, EPS, torch.tensor([0]), table, torch.tensor([4]), cache)
    assert cache[0, 4, 512:].tolist() == [2.0] * 64
