"""The kernel in CUDA C++ for many heads and a cache in bfloat16: on the CPU, and all of it on a GPU of SM 90."""

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
)
from vllm_dsv32.kernels import sparse_mla, sparse_mla_cuda, sparse_mla_cuda_bf16_wide


def bf16_problem(*args, **kwargs):
    return problem(*args, **kwargs, cache_format="bfloat16")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return kernel_on_cpu("sparse_mla_bf16_wide", tmp_path_factory.mktemp("cuda_on_cpu"))


def assert_right(got, q, cache, slots, valid, scale):
    out, lse = got
    empty = valid == 0
    assert not out[empty].any()
    assert bool((lse[empty] == -torch.inf).all())
    assert_near(got, sparse_mla.reference(q.float(), cache, slots, valid, scale))


def test_counts_around_tiles_on_cpu(on_cpu):
    arguments = bf16_problem(64, [0, 1, 63, 64, 65, 128, 129, 0, 0, 320], 320, 1024)
    assert_right(on_cpu(*arguments, 1), *arguments)


def test_few_keys_for_a_block_after_the_other_on_cpu(on_cpu):
    """So that what is copied ahead belongs to the next works but one."""
    arguments = bf16_problem(64, [1, 0, 64, 65, 1, 0, 0, 0, 1, 130, 64, 1], 192, 512)
    for seed in range(3):
        assert_right(on_cpu(*arguments, 1, seed), *arguments)


def test_no_keys_at_all_on_cpu(on_cpu):
    arguments = bf16_problem(128, [0, 0, 0], 64, 256)
    assert_right(on_cpu(*arguments, 1), *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="splits are joined in Triton, here interpreted")
@pytest.mark.parametrize(("num_heads", "num_splits"), [(64, 1), (64, 2), (64, 5), (128, 3)])
def test_splits_on_cpu(monkeypatch, on_cpu, num_heads, num_splits):
    q, cache, slots, valid, scale = arguments = bf16_problem(num_heads, [0, 1, 64, 65, 320], 320, 1024)

    def operator(q, cache, slots, valid, scale_log2, num_splits, out, lse):
        on_cpu(q, cache, slots, valid, scale_log2 / LOG2_E, num_splits, results=(out, lse))

    monkeypatch.setattr(torch.ops.vllm_dsv32, "sparse_mla_bf16_wide", operator, raising=False)
    monkeypatch.setattr(sparse_mla_cuda_bf16_wide, "split_count", lambda *_: num_splits)
    out, lse = torch.empty(*q.shape[:2], 512, dtype=torch.bfloat16), torch.empty(q.shape[:2])
    sparse_mla_cuda_bf16_wide.attend(q, cache, slots, valid, scale * LOG2_E, out, lse)
    assert_right((out, lse), *arguments)


@pytest.mark.parametrize(
    ("num_heads", "block_size"), [(33, 16), (63, 48), (65, 256), (100, 64), (128, 64), (129, 64)]
)
def test_other_heads_and_pages_on_cpu(on_cpu, num_heads, block_size):
    arguments = bf16_problem(num_heads, [130, 64], 192, 512, block_size)
    assert_right(on_cpu(*arguments, 1), *arguments)


@pytest.mark.parametrize("num_heads", [64, 128])
def test_results_do_not_depend_on_the_order_of_threads(on_cpu, num_heads):
    arguments = bf16_problem(num_heads, [0, 200, 1, 63, 256], 256, 512)
    out, lse = on_cpu(*arguments, 1)
    for seed in range(1, 7):  # of when each warp runs, and each product and copy is done
        again, lse_again = on_cpu(*arguments, 1, seed)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0, 20.0])
def test_scores_that_rise_from_tile_to_tile_on_cpu(on_cpu, strength):
    """By little, which leaves sums as they are, and by much, for some of the heads."""
    q, cache, slots, valid, scale = bf16_problem(64, [320], 320, 1024)
    q = q[:1] / 20
    q = ((q + q[:, -1:]) * strength * torch.linspace(0.1, 1, 64).unsqueeze(-1)).bfloat16()  # of much the same order
    scores = sparse_mla.gather_latent(cache, slots[0]) @ q[0, -1].float()
    slots = slots[:, scores.argsort()].contiguous()
    assert_right(on_cpu(q, cache, slots, valid, scale, 1), q, cache, slots, valid, scale)


def test_all_lanes_may_arrive_on_cpu(on_cpu, tmp_path):
    """As the build for racecheck has it."""
    by_all_lanes = kernel_on_cpu("sparse_mla_bf16_wide", tmp_path, "-DDSV32_ALL_LANES_ARRIVE")
    arguments = bf16_problem(128, [0, 63, 64, 320], 320, 1024)
    for got, wanted in zip(by_all_lanes(*arguments, 1), on_cpu(*arguments, 1), strict=True):
        assert torch.equal(got, wanted)


def test_a_row_of_nan_makes_nan_on_cpu(on_cpu):
    arguments = bf16_problem(40, [100], 128, 256)
    cache, slots = arguments[1:3]
    slot = int(slots[0, 7])
    cache[slot // 64, slot % 64] = torch.nan
    out, lse = on_cpu(*arguments, 1)
    assert bool(lse.isnan().all())
    assert bool(out.isnan().all())


def test_one_key_gives_its_row_on_cpu(on_cpu):
    q, cache, slots, valid, scale = bf16_problem(33, [1, 1, 1], 64, 256)
    out, _ = on_cpu(q, cache, slots, valid, scale, 1)
    rows = sparse_mla.gather_latent(cache, slots[:, 0])[:, None, :512]
    assert torch.equal(out.float(), rows.expand_as(out))


def test_products_overlap_and_registers_suffice(tmp_path):
    assert spilled_nbytes("sparse_mla_bf16_wide_sm90", tmp_path) == [0]


@pytest.mark.parametrize("num_splits", [None, 1, 2, 7, 32])
@pytest.mark.parametrize("num_heads", [33, 64, 100, 128, 192])
@needs_library
@needs_hopper
def test_counts_around_tiles_and_splits(monkeypatch, num_heads, num_splits):
    if num_splits is not None:
        monkeypatch.setattr(sparse_mla_cuda_bf16_wide, "split_count", lambda *_: num_splits)
    num_valid = [0, 1, 63, 64, 65, 127, 128, 129, 139, 1000, 2047, 2048, 2048]
    arguments = bf16_problem(num_heads, num_valid, 2048, 4096, device="cuda")
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
    arguments = bf16_problem(128, counts, 320, 4096, block_size, device="cuda")
    assert_right(sparse_mla_cuda.sparse_mla(*arguments), *arguments)
