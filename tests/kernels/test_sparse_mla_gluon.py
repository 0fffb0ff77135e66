"""What is particular to the Gluon kernels, which no interpreter runs: real tiles, rings that turn, and splits."""

from dataclasses import replace

import pytest
import torch

from kernels.inputs import PROBLEM, latent_cache
from vllm_dsv32.kernels import cuda_library, sparse_mla, sparse_mla_gluon, sparse_mla_launch
from vllm_dsv32.kernels.dispatch import explain, select_kernels
from vllm_dsv32.layout import latent_fp8_views

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of SM 90"
)
SCALE = 0.04
NUM_VALID = [0, 1, 63, 64, 65, 127, 128, 129, 139, 1000, 2047, 2048, 2048]
FORMATS_AND_HEADS = [
    *(("bfloat16", heads) for heads in (1, 8, 16, 17, 32, 64, 65, 128)),
    *(("fp8_ds_mla", heads) for heads in (1, 8, 16, 33, 64, 127, 128)),
]


def problem(cache_format: str, num_heads: int, num_valid: list[int], block_size: int = 64):
    """Rows that no token selects are NaN, and slots past the count point out of the cache."""
    torch.manual_seed(1)
    num_slots = 4096
    valid = torch.tensor(num_valid, dtype=torch.int32, device="cuda")
    slots = torch.stack([torch.randperm(num_slots)[:2048] for _ in num_valid]).int()
    for token, count in enumerate(num_valid):
        slots[token, count:] = 2**31 - 1
    slots = slots.cuda()
    used = slots[slots < num_slots].unique().long()
    cache = latent_cache(-(-num_slots // block_size), block_size, cache_format, gap_nbytes=64).cuda()
    if cache_format == "fp8_ds_mla":
        views, at = latent_fp8_views(cache), (used // block_size, used % block_size)
        values = torch.randn(len(used), 512, device="cuda")
        views.nope_fp8.view(torch.uint8)[at] = values.to(torch.float8_e4m3fn).view(torch.uint8)
        views.nope_scale[at] = torch.tensor([0.1, 1.0, 0.03, 0.5], device="cuda")
        views.rope[at] = torch.randn(len(used), 64, device="cuda").bfloat16()
    else:
        cache[used // block_size, used % block_size] = torch.randn(len(used), 576, device="cuda").bfloat16()
    q = torch.randn(len(num_valid), num_heads, 576, device="cuda").bfloat16()
    q[-1] *= 20  # a softmax of few keys, whose maximum moves
    return q, cache, slots, valid, SCALE


def assert_near(got, wanted):
    (out, lse), (wanted_out, wanted_lse) = got, wanted
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=2e-5)
    # By token: over many keys values average out, over one they do not.
    largest = wanted_out.abs().amax(dim=(1, 2), keepdim=True)
    worst = ((out.float() - wanted_out).abs() / (wanted_out.abs() + largest).clamp(min=1e-9)).max()
    assert worst <= 2**-7


@pytest.mark.parametrize("num_splits", [None, 1, 2, 3, 32])
@pytest.mark.parametrize(("cache_format", "num_heads"), FORMATS_AND_HEADS)
@needs_hopper
def test_counts_around_tiles_and_splits(monkeypatch, cache_format, num_heads, num_splits):
    if num_splits is not None:
        monkeypatch.setattr(sparse_mla_launch, "split_count", lambda *_: num_splits)
    arguments = problem(cache_format, num_heads, NUM_VALID)
    out, lse = sparse_mla_gluon.sparse_mla(*arguments)
    assert_near((out, lse), sparse_mla.reference(arguments[0].float(), *arguments[1:]))
    assert not out[0].any()
    assert bool((lse[0] == -torch.inf).all())
    for _ in range(20):
        again, lse_again = sparse_mla_gluon.sparse_mla(*arguments)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("block_size", [16, 48, 256])
@pytest.mark.parametrize("num_heads", [16, 64])
@pytest.mark.parametrize("cache_format", ["bfloat16", "fp8_ds_mla"])
@needs_hopper
def test_other_pages(cache_format, num_heads, block_size):
    arguments = problem(cache_format, num_heads, [300, 64, 2000], block_size)
    got = sparse_mla_gluon.sparse_mla(*arguments)
    assert_near(got, sparse_mla.reference(arguments[0].float(), *arguments[1:]))


@pytest.mark.parametrize(
    ("q", "cache", "message"),
    [
        (torch.zeros(1, 4, 576), torch.zeros(1, 16, 576), "takes queries in bfloat16, got torch.float32"),
        (
            torch.zeros(1, 4, 576).bfloat16(),
            torch.zeros(1, 16, 576),
            "takes a cache in bfloat16 or fp8_ds_mla, got torch.float32",
        ),
        (
            torch.zeros(1, 17, 576).bfloat16(),
            torch.zeros(1, 16, 656, dtype=torch.uint8),
            "takes up to 16 heads, or 33 and more, with an fp8_ds_mla cache, got 17",
        ),
    ],
)
def test_what_it_does_not_take(q, cache, message):
    with pytest.raises(ValueError, match=message):
        sparse_mla_gluon.sparse_mla(q, cache, torch.zeros(1, 1).int(), torch.ones(1).int(), SCALE)


def gluon_refusal(num_heads: int, cache_format: str) -> str | None:
    asked = replace(PROBLEM, num_heads=num_heads, cache_format=cache_format)
    return next(refusal for row, refusal in explain("sparse_mla", asked) if row.name == "gluon")


def test_the_table_offers_what_the_kernels_take():
    for num_heads in range(1, 130):
        refusal = gluon_refusal(num_heads, "fp8_ds_mla")
        assert (refusal is None) == sparse_mla_gluon.takes_fp8(num_heads)
        assert gluon_refusal(num_heads, "auto") is None
    assert gluon_refusal(17, "fp8_ds_mla") == "takes up to 16 heads, or 33 and more, with fp8_ds_mla, got 17"


@pytest.mark.parametrize(
    ("num_heads", "name"),
    [(1, "gluon"), (16, "gluon"), (17, "triton"), (32, "triton"), (33, "gluon"), (128, "gluon")],
)
def test_which_kernel_reads_an_fp8_cache_where_none_was_built(num_heads, name, monkeypatch):
    monkeypatch.setattr(cuda_library, "refusal", lambda: "was not built")
    kernels = select_kernels(replace(PROBLEM, num_heads=num_heads, cache_format="fp8_ds_mla"))
    assert kernels.names["sparse_mla"] == name


@pytest.mark.parametrize("num_heads", [8, 24, 32, 48, 64, 96, 128])
def test_which_kernel_reads_a_bfloat16_cache_where_none_was_built(monkeypatch, num_heads):
    monkeypatch.setattr(cuda_library, "refusal", lambda: "was not built")
    assert select_kernels(replace(PROBLEM, num_heads=num_heads)).names["sparse_mla"] == "gluon"
