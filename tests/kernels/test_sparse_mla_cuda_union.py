"""The kernel in CUDA C++ for four tokens of 16 heads at a time: on the CPU, and all of it on a GPU of SM 90."""

import ctypes

import pytest
import torch

from kernels.emulated import emulated, spilled_nbytes
from kernels.slot_union_cases import union_on_cpu, unite_with
from kernels.sparse_mla_cuda_cases import (
    LOG2_E,
    Arguments,
    assert_near,
    needs_hopper,
    needs_library,
    problem,
)
from vllm_dsv32.kernels import cuda_library, sparse_mla, sparse_mla_cuda_union, sparse_mla_gluon


def bf16_problem(num_valid, *args, **kwargs):
    return problem(16, num_valid, *args, **kwargs, cache_format="bfloat16")


def operators_on_cpu(directory, *options):
    """Both, as they are called."""
    unite = union_on_cpu(directory)
    function = emulated("sparse_mla_bf16_union", directory, *options).sparse_mla_bf16_union_on_cpu
    function.restype = ctypes.c_char_p

    def attend(q, cache, union_slot, num_union, seen, scale_log2, out, lse, seed=0):
        assert q.is_contiguous()
        arguments = Arguments(
            *(x.data_ptr() for x in (q, cache, union_slot, num_union, out, lse)),
            cache.stride(0) * cache.element_size(),
            scale_log2,
            *(q.shape[0], q.shape[1], union_slot.shape[1], cache.shape[1]),
        )
        assert function(ctypes.byref(arguments), ctypes.c_void_p(seen.data_ptr()), seed) is None

    return unite, attend


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    return operators_on_cpu(tmp_path_factory.mktemp("cuda_on_cpu"))


def attend_on_cpu(operators, q, cache, slots, valid, scale, seed=0):
    unite, attend = operators
    num_groups = len(q) // 4
    out = torch.full((num_groups, 64, 512), torch.nan, dtype=torch.bfloat16)
    lse = torch.full((num_groups, 64), torch.nan)
    union = unite_with(unite, slots, valid, seed=seed)
    attend(q.view(num_groups, 64, 576), cache, *union, scale * LOG2_E, out, lse, seed)
    return out.view(-1, 16, 512), lse.view(-1, 16)


def assert_right(got, q, cache, slots, valid, scale):
    out, lse = got
    empty = valid == 0
    assert not out[empty].any()
    assert bool((lse[empty] == -torch.inf).all())
    assert_near(got, sparse_mla.reference(q.float(), cache, slots, valid, scale))


@pytest.mark.parametrize("num_rows", [130, 160, 1024])
def test_counts_around_tiles_on_cpu(operators, num_rows):
    """Of groups that share nearly all, and of groups that share little."""
    arguments = bf16_problem([130, 129, 128, 130, 64, 65, 63, 1, 0, 1, 0, 0], 130, num_rows)
    assert_right(attend_on_cpu(operators, *arguments), *arguments)


def test_tokens_without_keys_on_cpu(operators):
    """Within groups that have some, at every place; and a group of none between others."""
    counts = [0, 70, 70, 70, 70, 0, 70, 70, 70, 70, 0, 70, 70, 70, 70, 0, 0, 0, 0, 0, 0, 0, 70, 0]
    arguments = bf16_problem(counts, 70, 100)
    assert_right(attend_on_cpu(operators, *arguments), *arguments)


def test_no_keys_at_all_on_cpu(operators):
    arguments = bf16_problem([0] * 8, 64, 256)
    assert_right(attend_on_cpu(operators, *arguments), *arguments)


def test_keys_of_a_token_in_late_tiles_on_cpu(operators):
    """Those of the last token come last: until then, nothing is subtracted from its scores."""
    q, cache, slots, valid, scale = bf16_problem([64, 64, 64, 64], 64, 64)
    whole = bf16_problem([256], 256, 256)
    cache, slots = whole[1], whole[2].reshape(4, 64).contiguous()
    for strength in (0.1, 1.0, 20.0):
        arguments = ((q * strength).bfloat16(), cache, slots, valid, scale)
        assert_right(attend_on_cpu(operators, *arguments), *arguments)


@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_groups_of_several_requests_on_cpu(operators, block_size):
    """Tokens whose rows lie apart; groups more than blocks."""
    counts = [(37 * token) % 101 for token in range(24)]
    q, cache, slots, valid, scale = bf16_problem(counts, 100, 600, block_size)
    assert_right(attend_on_cpu(operators, q, cache, slots, valid, scale), q, cache, slots, valid, scale)


@pytest.mark.parametrize("num_rows", [1, 30])
def test_slots_that_a_token_has_again_on_cpu(operators, num_rows):
    """They count as often as it has them."""
    q, cache, _, valid, scale = bf16_problem([100, 64, 0, 7], 100, 100)
    slots = torch.randint(num_rows, (4, 100), dtype=torch.int32)
    cache[:] = torch.randn(cache.shape)
    arguments = (q, cache, slots, valid, scale)
    assert_right(attend_on_cpu(operators, *arguments), *arguments)


@pytest.mark.parametrize("strength", [0.1, 4.0, 20.0])
def test_scores_that_rise_from_tile_to_tile_on_cpu(operators, strength):
    """By little, which leaves sums as they are, and by much, for some of the heads; of each token on its own."""
    q, cache, slots, valid, scale = bf16_problem([250] * 4, 250, 256)
    q = ((q[:1] + q[:1, -1:]) * strength * torch.linspace(0.1, 1, 16).unsqueeze(-1)).bfloat16().repeat(4, 1, 1)
    for token in range(4):
        scores = sparse_mla.gather_latent(cache, slots[token]) @ q[token, -1].float()
        slots[token] = slots[token, scores.argsort(descending=token % 2 == 1)]
    arguments = (q, cache, slots, valid, scale)
    assert_right(attend_on_cpu(operators, *arguments), *arguments)


def test_results_do_not_depend_on_the_order_of_threads(operators):
    arguments = bf16_problem([200, 1, 0, 256, 63, 64, 130, 128], 256, 300)
    out, lse = attend_on_cpu(operators, *arguments)
    for seed in range(1, 7):  # of when each warp runs, and each product and copy is done
        again, lse_again = attend_on_cpu(operators, *arguments, seed)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


def test_all_lanes_may_arrive_on_cpu(operators, tmp_path):
    """As the build for racecheck has it."""
    by_all_lanes = operators_on_cpu(tmp_path, "-DDSV32_ALL_LANES_ARRIVE")
    arguments = bf16_problem([0, 63, 64, 200], 200, 256)
    for got, wanted in zip(
        attend_on_cpu(by_all_lanes, *arguments), attend_on_cpu(operators, *arguments), strict=True
    ):
        assert torch.equal(got, wanted)


def test_a_row_of_nan_makes_nan_of_its_token_on_cpu(operators):
    """Of its group too, in part: zero times NaN is not zero. Of other groups, nothing."""
    q, cache, slots, valid, scale = arguments = bf16_problem([100] * 8, 100, 128)
    slot = int(slots[0, 7])
    slots[4:][slots[4:] == slot] = int(slots[0, 8])
    cache[slot // 64, slot % 64] = torch.nan
    out, lse = attend_on_cpu(operators, *arguments)
    assert bool(lse[0].isnan().all())
    assert bool(out[0].isnan().all())
    assert_right((out[4:], lse[4:]), q[4:], cache, slots[4:], valid[4:], scale)


def test_one_key_gives_its_row_on_cpu(operators):
    q, cache, slots, valid, scale = bf16_problem([1, 1, 1, 1], 64, 256)
    out, _ = attend_on_cpu(operators, q, cache, slots, valid, scale)
    rows = sparse_mla.gather_latent(cache, slots[:, 0])[:, None, :512]
    assert torch.equal(out.float(), rows.expand_as(out))


@pytest.fixture
def on_cpu(monkeypatch, operators):
    """The operation, for steps of eight tokens and more, with the reference for Gluon."""
    unite, attend = operators
    monkeypatch.setattr(torch.ops.vllm_dsv32, "slot_union", unite, raising=False)
    monkeypatch.setattr(torch.ops.vllm_dsv32, "sparse_mla_bf16_union", attend, raising=False)
    monkeypatch.setattr(cuda_library, "require", lambda: None)
    monkeypatch.setattr(sparse_mla_cuda_union, "MIN_TOKENS", 8)
    monkeypatch.setattr(sparse_mla_gluon, "sparse_mla", sparse_mla.reference)
    return sparse_mla_cuda_union.sparse_mla


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 11])
def test_tokens_that_are_left(on_cpu, num_tokens):
    q, cache, slots, valid, scale = bf16_problem([70, 0, 33, 64] * 3, 70, 100)
    arguments = (q[:num_tokens], cache, slots[:num_tokens], valid[:num_tokens], scale)
    assert_right(on_cpu(*arguments), *arguments)


def test_no_tokens(on_cpu):
    q, cache, slots, valid, scale = bf16_problem([8], 8, 64)
    out, lse = on_cpu(q[:0], cache, slots[:0], valid[:0], scale)
    assert (out.shape, lse.shape) == ((0, 16, 512), (0, 16))


def test_no_slots(on_cpu):
    q, cache, slots, valid, scale = bf16_problem([0] * 9, 64, 64)
    arguments = (q, cache, slots[:, :0], valid, scale)
    assert_right(on_cpu(*arguments), *arguments)


def test_tensors_with_gaps(on_cpu):
    q, cache, slots, valid, scale = arguments = bf16_problem([70, 0, 33, 64] * 2, 70, 100)
    wide, long = torch.cat((q, q), 1)[:, :16], torch.cat((slots, slots), 1)[:, :70]
    spread = valid.repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in (wide, long, spread))
    assert_right(on_cpu(wide, cache, long, spread, scale), *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 16, 576)}, "takes queries in bfloat16 with 16 heads, got torch.float32 with 16"),
        ({"q": torch.zeros(8, 8, 576).bfloat16()}, "got torch.bfloat16 with 8; choose gluon"),
        ({"cache": torch.zeros(1, 64, 656, dtype=torch.uint8)}, "takes a cache in bfloat16, got torch.uint8"),
        ({"cache": torch.zeros(1, 64, 576)}, "takes a cache in bfloat16, got torch.float32"),
        ({"topk_slot": torch.zeros(8, 2049, dtype=torch.int32)}, "at most 2048 slots a token, got 2049"),
        ({"cache": torch.zeros(2 * 577).bfloat16().as_strided((2, 1, 576), (577, 576, 1))}, "one every 1154"),
    ],
)
def test_refusals(on_cpu, change, message):
    q, cache, slots, valid, _ = bf16_problem([8] * 8, 8, 64)
    arguments = {"q": q, "cache": cache, "topk_slot": slots, "num_valid": valid} | change
    with pytest.raises(ValueError, match=message):
        on_cpu(**arguments, scale=1.0)


def test_products_overlap_and_registers_suffice(tmp_path):
    assert spilled_nbytes("sparse_mla_bf16_union_sm90", tmp_path) == [0]


def shared_problem(num_tokens, num_rows, overlap):
    """On a GPU, 2048 slots each; each token has such a share of those of the one before."""
    torch.manual_seed(1)
    num_others = round((1 - overlap) * 2048)
    drawn = torch.randint(num_rows, ((num_tokens - 1) * num_others + 2048,), device="cuda", dtype=torch.int32)
    cache = torch.randn(num_rows // 64, 64, 576, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(num_tokens, 16, 576, device="cuda", dtype=torch.bfloat16)
    valid = torch.full((num_tokens,), 2048, device="cuda", dtype=torch.int32)
    return q, cache, drawn.unfold(0, 2048, num_others).sort(-1).values, valid, 0.04


@pytest.mark.parametrize("overlap", [0.0, 0.8, 0.99])
@needs_library
@needs_hopper
def test_a_prefill(overlap):
    """Slots that a token has again are among them."""
    q, cache, slots, valid, scale = shared_problem(4096 + 3, 32 << 10, overlap)
    out, lse = sparse_mla_cuda_union.sparse_mla(q, cache, slots, valid, scale)
    for rows in (slice(64), slice(2000, 2064), slice(-64, None)):
        assert_right((out[rows], lse[rows]), q[rows], cache, slots[rows], valid[rows], scale)
    for _ in range(5):
        again, lse_again = sparse_mla_cuda_union.sparse_mla(q, cache, slots, valid, scale)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@needs_library
@needs_hopper
def test_counts_around_tiles():
    counts = [0, 1, 63, 64, 65, 127, 128, 129, 139, 1000, 2047, 2048, 2048, 0, 0, 0] * 33
    arguments = bf16_problem(counts[:-1], 2048, 4096, device="cuda")
    assert_right(sparse_mla_cuda_union.sparse_mla(*arguments), *arguments)


@pytest.mark.parametrize("block_size", [16, 48, 256])
@needs_library
@needs_hopper
def test_other_pages(block_size):
    counts = [(7 * token) % 300 for token in range(1000)]
    arguments = bf16_problem(counts, 320, 4096, block_size, device="cuda")
    assert_right(sparse_mla_cuda_union.sparse_mla(*arguments), *arguments)


@needs_library
@needs_hopper
def test_in_a_graph():
    arguments = shared_problem(1026, 16 << 10, 0.8)
    wanted = sparse_mla_cuda_union.sparse_mla(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sparse_mla_cuda_union.sparse_mla(*arguments)
    graph.replay()
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)
