"""The kernel in CUDA C++ for many heads: its arithmetic and barriers on the CPU, all of it on a GPU of SM 90."""

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


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return kernel_on_cpu("sparse_mla_wide", tmp_path_factory.mktemp("cuda_on_cpu"))


def assert_right(got, q, cache, slots, valid, scale):
    out, lse = got
    empty = valid == 0
    assert not out[empty].any()
    assert bool((lse[empty] == -torch.inf).all())
    assert_near(got, sparse_mla.reference(q.float(), rounded_to_float16(cache), slots, valid, scale))


def test_rows_are_rounded_to_eleven_bits_twice():
    cache = problem(64, [320], 320, 1024)[1]
    rows = rounded_to_float16(cache)
    exact = sparse_mla.gather_latent(cache, torch.arange(1024)).view_as(rows)
    torch.testing.assert_close(rows, exact, rtol=2**-10 * 1.001, atol=2**-20, equal_nan=True)


def test_exact_rows_give_much_the_same_on_cpu(on_cpu):
    q, *rest = problem(64, [0, 1, 63, 64, 65, 128, 129, 320], 320, 1024)
    q[-1] /= 20
    out, lse = on_cpu(q, *rest, 1)
    wanted, wanted_lse = sparse_mla.reference(q.float(), *rest)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=2e-3)
    torch.testing.assert_close(out.float(), wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))


def test_counts_around_tiles_on_cpu(on_cpu):
    arguments = problem(64, [0, 1, 63, 64, 65, 128, 129, 320], 320, 1024)
    assert_right(on_cpu(*arguments, 1), *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="splits are joined in Triton, here interpreted")
@pytest.mark.parametrize(("num_heads", "num_splits"), [(64, 1), (64, 2), (64, 5), (128, 3)])
def test_splits_on_cpu(monkeypatch, on_cpu, num_heads, num_splits):
    q, cache, slots, valid, scale = arguments = problem(num_heads, [0, 1, 64, 65, 320], 320, 1024)

    def operator(q, cache, slots, valid, scale_log2, num_splits, out, lse):
        on_cpu(q, cache, slots, valid, scale_log2 / LOG2_E, num_splits, results=(out, lse))

    monkeypatch.setattr(torch.ops.vllm_dsv32, "sparse_mla_fp8_wide", operator, raising=False)
    monkeypatch.setattr(sparse_mla_cuda_wide, "split_count", lambda *_: num_splits)
    out, lse = torch.empty(*q.shape[:2], 512, dtype=torch.bfloat16), torch.empty(q.shape[:2])
    sparse_mla_cuda_wide.attend(q, cache, slots, valid, scale * LOG2_E, out, lse)
    assert_right((out, lse), *arguments)


@pytest.mark.parametrize(("num_heads", "block_size"), [(33, 16), (63, 48), (65, 256), (128, 64), (129, 64)])
def test_other_heads_and_pages_on_cpu(on_cpu, num_heads, block_size):
    arguments = problem(num_heads, [130, 64], 192, 512, block_size)
    assert_right(on_cpu(*arguments, 1), *arguments)


@pytest.mark.parametrize("num_heads", [64, 128])
def test_results_do_not_depend_on_the_order_of_threads(on_cpu, num_heads):
    arguments = problem(num_heads, [0, 200, 1, 63, 192], 256, 512)
    out, lse = on_cpu(*arguments, 1)
    for seed in range(1, 5):  # of when each warp runs and each product is computed
        again, lse_again = on_cpu(*arguments, 1, seed)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0, 20.0])
def test_scores_that_rise_from_tile_to_tile_on_cpu(on_cpu, strength):
    """By little, which leaves sums as they are, and by much, for some of the heads."""
    q, cache, slots, valid, scale = problem(64, [320], 320, 1024)
    q = q[:1] / 20
    q = ((q + q[:, -1:]) * strength * torch.linspace(0.1, 1, 64).unsqueeze(-1)).bfloat16()  # of much the same order
    scores = sparse_mla.gather_latent(cache, slots[0]) @ q[0, -1].float()
    slots = slots[:, scores.argsort()].contiguous()
    assert_right(on_cpu(q, cache, slots, valid, scale, 1), q, cache, slots, valid, scale)


def test_all_lanes_may_arrive_on_cpu(on_cpu, tmp_path):
    """As the build for racecheck has it."""
    by_all_lanes = kernel_on_cpu("sparse_mla_wide", tmp_path, "-DDSV32_ALL_LANES_ARRIVE")
    arguments = problem(128, [0, 63, 64, 320], 320, 1024)
    for got, wanted in zip(by_all_lanes(*arguments, 1), on_cpu(*arguments, 1), strict=True):
        assert torch.equal(got, wanted)


def test_a_row_of_nan_makes_nan_on_cpu(on_cpu):
    arguments = problem(40, [100], 128, 256)
    cache, slots = arguments[1:3]
    slot = int(slots[0, 7])
    latent_fp8_views(cache).nope_scale[slot // 64, slot % 64, 2] = torch.nan
    out, lse = on_cpu(*arguments, 1)
    assert bool(lse.isnan().all())
    assert bool(out.isnan().all())


def test_every_code_and_its_scale_on_cpu(on_cpu):
    """One key a token, whose weight is one: what comes out is the row, rounded."""
    q, cache, slots, valid, scale = problem(33, [1, 1, 1], 64, 256)
    views = latent_fp8_views(cache)
    scales = torch.tensor([[1.0, 1 / 448, 3.1e-5, 77.7], [1e-3, 0.017, 500.0, 3e-4], [0.0, 0.3, 2.0, 1e4]])
    for token, at in enumerate(slots[:, 0].tolist()):
        codes = torch.randperm(512) % 256
        codes[codes % 128 == 127] = 0  # NaN
        views.nope_fp8.view(torch.uint8)[at // 64, at % 64] = codes.to(torch.uint8)
        views.nope_scale[at // 64, at % 64] = scales[token]
    out, _ = on_cpu(q, cache, slots, valid, scale, 1)
    assert torch.equal(out, out[:, :1].expand_as(out))
    wanted = sparse_mla.gather_latent(rounded_to_float16(cache), slots[:, 0])[:, :512]
    # Half of the last bit of eight, and a little for the weight.
    torch.testing.assert_close(out[:, 0].float(), wanted, rtol=2**-8 * 1.05, atol=0)
    exact = sparse_mla.gather_latent(cache, slots[:, 0])[:, :512]
    # Of latents, the last bit in float16 is at least 2^-24 of the power of two; of scales too, times 448 at most.
    atol = 2**-24 * 448 * scales.amax(-1, keepdim=True) / 16
    assert bool(((out[:, 0].float() - exact).abs() <= (2**-8 * 1.05 + 2**-10) * exact.abs() + atol).all())


def test_products_overlap_and_registers_suffice(tmp_path):
    of_one_block, of_two_blocks = spilled_nbytes("sparse_mla_wide_sm90", tmp_path)
    assert of_one_block == of_two_blocks == 0


@pytest.mark.parametrize("num_splits", [None, 1, 2, 7, 32])
@pytest.mark.parametrize("num_heads", [33, 64, 96, 128, 192])
@needs_library
@needs_hopper
def test_counts_around_tiles_and_splits(monkeypatch, num_heads, num_splits):
    if num_splits is not None:
        monkeypatch.setattr(sparse_mla_cuda_wide, "split_count", lambda *_: num_splits)
    num_valid = [0, 1, 63, 64, 65, 127, 128, 129, 139, 1000, 2047, 2048, 2048]
    arguments = problem(num_heads, num_valid, 2048, 4096, device="cuda")
    out, lse = sparse_mla_cuda.sparse_mla(*arguments)
    assert_right((out, lse), *arguments)
    for _ in range(20):
        again, lse_again = sparse_mla_cuda.sparse_mla(*arguments)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("block_size", [16, 48, 256])
@needs_library
@needs_hopper
def test_more_works_than_multiprocessors(block_size):
    counts = [(7 * token) % 300 for token in range(399)]
    arguments = problem(128, counts, 320, 4096, block_size, device="cuda")
    assert_right(sparse_mla_cuda.sparse_mla(*arguments), *arguments)
