"""The kernels in CUDA C++ for many heads: their arithmetic and barriers on the CPU, and all of them on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from kernels.emulated import spilled_nbytes
from kernels.sparse_mla_cuda_cases import (
    LOG2_E,
    assert_near,
    kernel_on_cpu,
    needs_hopper,
    needs_library,
    problem,
    rounded_to_float16,
)
from vllm_dsv32.kernels import sparse_mla, sparse_mla_cuda, sparse_mla_cuda_wide
from vllm_dsv32.layout import latent_fp8_views


@dataclass(frozen=True)
class Wide:
    """What is of one of the kernels."""

    name: str
    """Of the sources, but for what follows sparse_mla, and without _sm90."""
    operator: str
    problem: Callable
    decoded: Callable[[torch.Tensor], torch.Tensor]
    """The cache as products have it."""

    def assert_right(self, got, q, cache, slots, valid, scale):
        out, lse = got
        empty = valid == 0
        assert not out[empty].any()
        assert bool((lse[empty] == -torch.inf).all())
        assert_near(got, sparse_mla.reference(q.float(), self.decoded(cache), slots, valid, scale))


FP8 = Wide("sparse_mla_wide", "sparse_mla_fp8_wide", problem, rounded_to_float16)
BF16 = Wide(
    "sparse_mla_bf16_wide",
    "sparse_mla_bf16_wide",
    partial(problem, cache_format="bfloat16"),
    lambda cache: cache,
)


@pytest.fixture(scope="module", params=[FP8, BF16], ids=["fp8", "bf16"])
def wide(request):
    return request.param


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    kernels = {}

    def of(wide):
        if wide.name not in kernels:
            kernels[wide.name] = kernel_on_cpu(wide.name, tmp_path_factory.mktemp(wide.name))
        return kernels[wide.name]

    return of


@pytest.fixture
def on_cpu(emulated, wide):
    return emulated(wide)


def test_counts_around_tiles_on_cpu(wide, on_cpu):
    arguments = wide.problem(64, [0, 1, 63, 64, 65, 128, 129, 0, 0, 320], 320, 1024)
    wide.assert_right(on_cpu(*arguments, 1), *arguments)


def test_few_keys_for_a_block_after_the_other_on_cpu(wide, on_cpu):
    """So that what is copied ahead belongs to the next works but one."""
    arguments = wide.problem(64, [1, 0, 64, 65, 1, 0, 0, 0, 1, 130, 64, 1], 192, 512)
    for seed in range(3):
        wide.assert_right(on_cpu(*arguments, 1, seed), *arguments)


def test_no_keys_at_all_on_cpu(wide, on_cpu):
    arguments = wide.problem(128, [0, 0, 0], 64, 256)
    wide.assert_right(on_cpu(*arguments, 1), *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="splits are joined in Triton, here interpreted")
@pytest.mark.parametrize(("num_heads", "num_splits"), [(64, 1), (64, 2), (64, 5), (128, 3)])
def test_splits_on_cpu(monkeypatch, wide, on_cpu, num_heads, num_splits):
    q, cache, slots, valid, scale = arguments = wide.problem(num_heads, [0, 1, 64, 65, 320], 320, 1024)

    def operator(q, cache, slots, valid, scale_log2, num_splits, out, lse):
        on_cpu(q, cache, slots, valid, scale_log2 / LOG2_E, num_splits, results=(out, lse))

    monkeypatch.setattr(torch.ops.vllm_dsv32, wide.operator, operator, raising=False)
    monkeypatch.setattr(sparse_mla_cuda_wide, "split_count", lambda *_: num_splits)
    out, lse = torch.empty(*q.shape[:2], 512, dtype=torch.bfloat16), torch.empty(q.shape[:2])
    sparse_mla_cuda_wide.attend(q, cache, slots, valid, scale * LOG2_E, out, lse)
    wide.assert_right((out, lse), *arguments)


@pytest.mark.parametrize(
    ("num_heads", "block_size"), [(33, 16), (63, 48), (65, 256), (100, 64), (128, 64), (129, 64)]
)
def test_other_heads_and_pages_on_cpu(wide, on_cpu, num_heads, block_size):
    arguments = wide.problem(num_heads, [130, 64], 192, 512, block_size)
    wide.assert_right(on_cpu(*arguments, 1), *arguments)


@pytest.mark.parametrize("num_heads", [64, 128])
def test_results_do_not_depend_on_the_order_of_threads(wide, on_cpu, num_heads):
    arguments = wide.problem(num_heads, [0, 200, 1, 63, 256], 256, 512)
    out, lse = on_cpu(*arguments, 1)
    for seed in range(1, 7):  # of when each warp runs, and each product and copy is done
        again, lse_again = on_cpu(*arguments, 1, seed)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0, 20.0])
def test_scores_that_rise_from_tile_to_tile_on_cpu(wide, on_cpu, strength):
    """By little, which leaves sums as they are, and by much, for some of the heads."""
    q, cache, slots, valid, scale = wide.problem(64, [320], 320, 1024)
    q = q[:1] / 20
    q = ((q + q[:, -1:]) * strength * torch.linspace(0.1, 1, 64).unsqueeze(-1)).bfloat16()  # of much the same order
    scores = sparse_mla.gather_latent(cache, slots[0]) @ q[0, -1].float()
    slots = slots[:, scores.argsort()].contiguous()
    wide.assert_right(on_cpu(q, cache, slots, valid, scale, 1), q, cache, slots, valid, scale)


def test_all_lanes_may_arrive_on_cpu(wide, on_cpu, tmp_path):
    """As the build for racecheck has it."""
    by_all_lanes = kernel_on_cpu(wide.name, tmp_path, "-DDSV32_ALL_LANES_ARRIVE")
    arguments = wide.problem(128, [0, 63, 64, 320], 320, 1024)
    for got, wanted in zip(by_all_lanes(*arguments, 1), on_cpu(*arguments, 1), strict=True):
        assert torch.equal(got, wanted)


def test_products_overlap_and_registers_suffice(wide, tmp_path):
    assert not any(spilled_nbytes(f"{wide.name}_sm90", tmp_path))


@pytest.mark.parametrize("num_splits", [None, 1, 2, 7, 32])
@pytest.mark.parametrize("num_heads", [33, 64, 100, 128, 192])
@needs_library
@needs_hopper
def test_counts_around_tiles_and_splits(monkeypatch, wide, num_heads, num_splits):
    if num_splits is not None:
        monkeypatch.setattr(sparse_mla_cuda_wide, "split_count", lambda *_: num_splits)
    num_valid = [0, 1, 63, 64, 65, 127, 128, 129, 139, 1000, 2047, 2048, 2048]
    arguments = wide.problem(num_heads, num_valid, 2048, 4096, device="cuda")
    out, lse = sparse_mla_cuda.sparse_mla(*arguments)
    wide.assert_right((out, lse), *arguments)
    for _ in range(20):
        again, lse_again = sparse_mla_cuda.sparse_mla(*arguments)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("block_size", [16, 48, 256])
@needs_library
@needs_hopper
def test_more_works_than_multiprocessors(wide, block_size):
    counts = [(7 * token) % 300 for token in range(399)]
    arguments = wide.problem(128, counts, 320, 4096, block_size, device="cuda")
    wide.assert_right(sparse_mla_cuda.sparse_mla(*arguments), *arguments)


def test_rows_are_rounded_to_eleven_bits_twice():
    cache = problem(64, [320], 320, 1024)[1]
    rows = rounded_to_float16(cache)
    exact = sparse_mla.gather_latent(cache, torch.arange(1024)).view_as(rows)
    torch.testing.assert_close(rows, exact, rtol=2**-10 * 1.001, atol=2**-20, equal_nan=True)


def test_exact_rows_give_much_the_same_on_cpu(emulated):
    q, *rest = problem(64, [0, 1, 63, 64, 65, 128, 129, 320], 320, 1024)
    q[-1] /= 20
    out, lse = emulated(FP8)(q, *rest, 1)
    wanted, wanted_lse = sparse_mla.reference(q.float(), *rest)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=2e-3)
    torch.testing.assert_close(out.float(), wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))


def test_every_code_and_its_scale_on_cpu(emulated):
    """One key a token, whose weight is one: what comes out is the row, rounded."""
    q, cache, slots, valid, scale = problem(33, [1, 1, 1], 64, 256)
    views = latent_fp8_views(cache)
    scales = torch.tensor([[1.0, 1 / 448, 3.1e-5, 77.7], [1e-3, 0.017, 500.0, 3e-4], [0.0, 0.3, 2.0, 1e4]])
    for token, at in enumerate(slots[:, 0].tolist()):
        codes = torch.randperm(512) % 256
        codes[codes % 128 == 127] = 0  # NaN
        views.nope_fp8.view(torch.uint8)[at // 64, at % 64] = codes.to(torch.uint8)
        views.nope_scale[at // 64, at % 64] = scales[token]
    out, _ = emulated(FP8)(q, cache, slots, valid, scale, 1)
    assert torch.equal(out, out[:, :1].expand_as(out))
    wanted = sparse_mla.gather_latent(rounded_to_float16(cache), slots[:, 0])[:, :512]
    # Half of the last bit of eight, and a little for the weight.
    torch.testing.assert_close(out[:, 0].float(), wanted, rtol=2**-8 * 1.05, atol=0)
    exact = sparse_mla.gather_latent(cache, slots[:, 0])[:, :512]
    # Of latents, the last bit in float16 is at least 2^-24 of the power of two; of scales too, times 448 at most.
    atol = 2**-24 * 448 * scales.amax(-1, keepdim=True) / 16
    assert bool(((out[:, 0].float() - exact).abs() <= (2**-8 * 1.05 + 2**-10) * exact.abs() + atol).all())


def test_a_scale_of_nan_makes_nan_on_cpu(emulated):
    arguments = problem(40, [100], 128, 256)
    cache, slots = arguments[1:3]
    slot = int(slots[0, 7])
    latent_fp8_views(cache).nope_scale[slot // 64, slot % 64, 2] = torch.nan
    out, lse = emulated(FP8)(*arguments, 1)
    assert bool(lse.isnan().all())
    assert bool(out.isnan().all())


def test_a_row_of_nan_makes_nan_on_cpu(emulated):
    arguments = BF16.problem(40, [100], 128, 256)
    cache, slots = arguments[1:3]
    slot = int(slots[0, 7])
    cache[slot // 64, slot % 64] = torch.nan
    out, lse = emulated(BF16)(*arguments, 1)
    assert bool(lse.isnan().all())
    assert bool(out.isnan().all())


def test_one_key_gives_its_row_on_cpu(emulated):
    q, cache, slots, valid, scale = BF16.problem(33, [1, 1, 1], 64, 256)
    out, _ = emulated(BF16)(q, cache, slots, valid, scale, 1)
    rows = sparse_mla.gather_latent(cache, slots[:, 0])[:, None, :512]
    assert torch.equal(out.float(), rows.expand_as(out))
