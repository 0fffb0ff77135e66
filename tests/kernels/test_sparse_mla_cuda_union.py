"""The kernel in CUDA C++ for four tokens of 16 heads at a time: on the CPU, and all of it on a GPU of SM 90."""

import ctypes
from functools import partial

import pytest
import torch

from kernels.emulated import emulated, spilled_nbytes
from kernels.inputs import latent_cache
from kernels.slot_union_cases import assert_attended, pages_on_cpu, selections, union_on_cpu, united
from kernels.sparse_mla_cuda_cases import (
    LOG2_E,
    Arguments,
    assert_near,
    kernel_on_cpu,
    needs_hopper,
    needs_library,
    problem,
)
from vllm_dsv32.kernels import (
    cuda_library,
    slot_union_cuda,
    sparse_mla,
    sparse_mla_cuda,
    sparse_mla_cuda_union,
    sparse_mla_gluon,
)
from vllm_dsv32.layout import is_fp8_ds_mla, latent_fp8_views


def bf16_problem(num_valid, *args, **kwargs):
    return problem(16, num_valid, *args, **kwargs, cache_format="bfloat16")


def operators_on_cpu(directory, *options):
    """By name, as they are called."""
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

    attend_one_by_one = kernel_on_cpu("sparse_mla", directory, *options)

    def attend_fp8(q, cache, slots, valid, scale_log2, num_splits, out, lse, seed=0):
        attend_one_by_one(q, cache, slots, valid, scale_log2 / LOG2_E, num_splits, seed, results=(out, lse))

    return {
        "slot_union": union_on_cpu(directory),
        "latent_pages": pages_on_cpu(directory),
        "sparse_mla_fp8": attend_fp8,
        "sparse_mla_bf16_union": attend,
    }


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    return operators_on_cpu(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def on_cpu(monkeypatch, operators):
    """The operation, for steps of four tokens and more, with the reference for whom tokens are left to.

    Takes the order of threads too, and others for the operators.
    """
    torch.use_deterministic_algorithms(mode=True)  # so results are NaN until they are written
    monkeypatch.setattr(cuda_library, "require", lambda: None)
    monkeypatch.setattr(sparse_mla_cuda_union, "MIN_TOKENS", 4)
    monkeypatch.setattr(sparse_mla_cuda, "num_whole_tokens", lambda q, num_keys: len(q))
    for module in (sparse_mla_cuda, sparse_mla_gluon):
        monkeypatch.setattr(module, "sparse_mla", sparse_mla.reference)

    def call(*arguments, seed=0, operators=operators):
        for name, operator in operators.items():
            monkeypatch.setattr(torch.ops.vllm_dsv32, name, partial(operator, seed=seed), raising=False)
        return sparse_mla_cuda_union.sparse_mla(*arguments)

    yield call
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.parametrize("num_rows", [130, 160, 1024])
def test_counts_around_tiles_on_cpu(on_cpu, num_rows):
    """Of groups that share nearly all, and of groups that share little."""
    arguments = bf16_problem([130, 129, 128, 130, 64, 65, 63, 1, 0, 1, 0, 0], 130, num_rows)
    assert_attended(on_cpu(*arguments), *arguments)


def test_tokens_without_keys_on_cpu(on_cpu):
    """Within groups that have some, at every place; and a group of none between others."""
    counts = [0, 70, 70, 70, 70, 0, 70, 70, 70, 70, 0, 70, 70, 70, 70, 0, 0, 0, 0, 0, 0, 0, 70, 0]
    arguments = bf16_problem(counts, 70, 100)
    assert_attended(on_cpu(*arguments), *arguments)


def test_no_keys_at_all_on_cpu(on_cpu):
    arguments = bf16_problem([0] * 8, 64, 256)
    assert_attended(on_cpu(*arguments), *arguments)


def test_keys_of_a_token_in_late_tiles_on_cpu(on_cpu):
    """Those of the last token come last: until then, nothing is subtracted from its scores."""
    q, cache, slots, valid, scale = bf16_problem([64, 64, 64, 64], 64, 64)
    whole = bf16_problem([256], 256, 256)
    cache, slots = whole[1], whole[2].reshape(4, 64).contiguous()
    for strength in (0.1, 1.0, 20.0):
        arguments = ((q * strength).bfloat16(), cache, slots, valid, scale)
        assert_attended(on_cpu(*arguments), *arguments)


@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_groups_of_several_requests_on_cpu(on_cpu, block_size):
    """Tokens whose rows lie apart; groups more than blocks."""
    counts = [(37 * token) % 101 for token in range(24)]
    q, cache, slots, valid, scale = bf16_problem(counts, 100, 600, block_size)
    assert_attended(on_cpu(q, cache, slots, valid, scale), q, cache, slots, valid, scale)


@pytest.mark.parametrize("num_rows", [1, 30])
def test_slots_that_a_token_has_again_on_cpu(on_cpu, num_rows):
    """They count as often as it has them."""
    q, cache, _, valid, scale = bf16_problem([100, 64, 0, 7], 100, 100)
    slots = torch.randint(num_rows, (4, 100), dtype=torch.int32)
    cache[:] = torch.randn(cache.shape)
    arguments = (q, cache, slots, valid, scale)
    assert_attended(on_cpu(*arguments), *arguments)


@pytest.mark.parametrize("strength", [0.1, 4.0, 20.0])
def test_scores_that_rise_from_tile_to_tile_on_cpu(on_cpu, strength):
    """By little, which leaves sums as they are, and by much, for some of the heads; of each token on its own."""
    q, cache, slots, valid, scale = bf16_problem([250] * 4, 250, 256)
    q = ((q[:1] + q[:1, -1:]) * strength * torch.linspace(0.1, 1, 16).unsqueeze(-1)).bfloat16().repeat(4, 1, 1)
    for token in range(4):
        scores = sparse_mla.gather_latent(cache, slots[token]) @ q[token, -1].float()
        slots[token] = slots[token, scores.argsort(descending=token % 2 == 1)]
    arguments = (q, cache, slots, valid, scale)
    assert_attended(on_cpu(*arguments), *arguments)


def test_results_do_not_depend_on_the_order_of_threads(on_cpu):
    arguments = bf16_problem([200, 1, 0, 256, 63, 64, 130, 128], 256, 300)
    out, lse = on_cpu(*arguments)
    for seed in range(1, 7):  # of when each warp runs, and each product and copy is done
        again, lse_again = on_cpu(*arguments, seed=seed)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


def test_all_lanes_may_arrive_on_cpu(on_cpu, tmp_path):
    """As the build for racecheck has it."""
    by_all_lanes = operators_on_cpu(tmp_path, "-DDSV32_ALL_LANES_ARRIVE")
    arguments = bf16_problem([0, 63, 64, 200], 200, 256)
    for got, by_one in zip(on_cpu(*arguments, operators=by_all_lanes), on_cpu(*arguments), strict=True):
        assert torch.equal(got, by_one)


def test_a_row_of_nan_makes_nan_of_its_token_on_cpu(on_cpu):
    """Of its group too, in part: zero times NaN is not zero. Of other groups, nothing."""
    q, cache, slots, valid, scale = arguments = bf16_problem([100] * 8, 100, 128)
    slot = int(slots[0, 7])
    slots[4:][slots[4:] == slot] = int(slots[0, 8])
    cache[slot // 64, slot % 64] = torch.nan
    out, lse = on_cpu(*arguments)
    assert bool(lse[0].isnan().all())
    assert bool(out[0].isnan().all())
    assert_attended((out[4:], lse[4:]), q[4:], cache, slots[4:], valid[4:], scale)


def test_one_key_gives_its_row_on_cpu(on_cpu):
    q, cache, slots, valid, scale = bf16_problem([1, 1, 1, 1], 64, 256)
    out, _ = on_cpu(q, cache, slots, valid, scale)
    rows = sparse_mla.gather_latent(cache, slots[:, 0])[:, None, :512]
    assert torch.equal(out.float(), rows.expand_as(out))


def mixed_problem(block_size=64):
    """Groups that share nearly all, nothing, have no keys, or a few; and whose first two tokens share nothing."""
    counts = [90, 89, 90, 65, *(90, 90, 90, 90), *(0, 0, 0, 0), 2, 1, 0, 2, *(90, 90, 90, 90), 90, 80, 90, 90]
    q, cache, slots, valid, scale = problem(16, counts, 90, 400, block_size)
    for first, overlap in ((0, 0.95), (20, 0.8)):
        same, _ = selections(90, [90] * 4, overlap, num_rows=400)
        slots[first : first + 4] = same
    slots[12:16, :2] = torch.tensor([5, 6])
    slots[18:20] = slots[17]
    slots[16] = torch.arange(400)[~torch.isin(torch.arange(400), slots[17])][:90]
    fill(cache)  # all rows, since other slots are named now
    return q, cache, slots, valid, scale


def fill(cache):
    """All rows."""
    if not is_fp8_ds_mla(cache):
        cache[:] = torch.randn(cache.shape)
        return
    views = latent_fp8_views(cache)
    codes = torch.randn(views.nope_fp8.shape).to(torch.float8_e4m3fn)
    views.nope_fp8.view(torch.uint8)[:] = codes.view(torch.uint8)
    views.nope_scale[:] = 0.03 + torch.rand(views.nope_scale.shape)
    views.rope[:] = torch.randn(views.rope.shape).bfloat16()


@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_an_fp8_cache_on_cpu(on_cpu, block_size):
    arguments = mixed_problem(block_size)
    unions = united(*arguments[2:4], 9 / 16)
    assert [union is not None for union in unions] == [True, False, True, True, False, True]
    out, lse = on_cpu(*arguments)
    assert_attended((out, lse), *arguments)
    for seed in range(1, 4):
        again, lse_again = on_cpu(*arguments, seed=seed)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


def test_an_fp8_cache_of_which_too_many_pages_are_named_on_cpu(on_cpu, monkeypatch):
    """Then all tokens are attended one by one."""
    arguments = mixed_problem()
    monkeypatch.setattr(slot_union_cuda, "PLACED_NBYTES", 5 * 64 * 1152)
    got = on_cpu(*arguments)
    assert_near(got, sparse_mla.reference(arguments[0].float(), *arguments[1:]))
    monkeypatch.setattr(slot_union_cuda, "PLACED_NBYTES", 7 * 64 * 1152)
    assert_attended(on_cpu(*arguments), *arguments)


@pytest.mark.parametrize("num_whole", [0, 3, 4, 18, 24])
def test_tokens_of_an_fp8_cache_that_are_left_on_cpu(on_cpu, monkeypatch, num_whole):
    arguments = mixed_problem()
    monkeypatch.setattr(sparse_mla_cuda, "num_whole_tokens", lambda q, num_keys: num_whole)
    assert_attended(on_cpu(*arguments), *arguments, num_whole)


@pytest.mark.parametrize("max_tokens", [4, 16])
def test_long_steps_in_parts_on_cpu(on_cpu, monkeypatch, max_tokens):
    monkeypatch.setattr(sparse_mla_cuda_union, "MAX_TOKENS", max_tokens)
    arguments = mixed_problem()
    assert_attended(on_cpu(*arguments), *arguments)


def test_scratch_covers_what_is_taken():
    cache = torch.empty(100_000, 64, 1, device="meta")
    num_groups, num_slots = sparse_mla_cuda_union.MAX_TOKENS // 4, slot_union_cuda.MAX_SLOTS * 4
    places = slot_union_cuda.Places.for_cache(cache)
    unions = num_groups * (num_slots * 4 + num_slots // 64 * 4 * 8 + 5 * 4)
    taken = len(places.pages) * (64 * 1152 + 4) + len(places.table) * 4 + unions
    assert 0.9 * sparse_mla_cuda_union.SCRATCH_NBYTES < taken < sparse_mla_cuda_union.SCRATCH_NBYTES


@pytest.mark.parametrize("num_tokens", [1, 3, 7, 8, 9, 11])
def test_tokens_that_are_left(on_cpu, num_tokens):
    q, cache, slots, valid, scale = bf16_problem([70, 0, 33, 64] * 3, 70, 100)
    arguments = (q[:num_tokens], cache, slots[:num_tokens], valid[:num_tokens], scale)
    assert_attended(on_cpu(*arguments), *arguments)


def test_no_tokens(on_cpu):
    q, cache, slots, valid, scale = bf16_problem([8], 8, 64)
    out, lse = on_cpu(q[:0], cache, slots[:0], valid[:0], scale)
    assert (out.shape, lse.shape) == ((0, 16, 512), (0, 16))


def test_no_slots(on_cpu):
    q, cache, slots, valid, scale = bf16_problem([0] * 9, 64, 64)
    arguments = (q, cache, slots[:, :0], valid, scale)
    assert_attended(on_cpu(*arguments), *arguments)


def test_tensors_with_gaps(on_cpu):
    q, cache, slots, valid, scale = arguments = bf16_problem([70, 0, 33, 64] * 2, 70, 100)
    wide, long = torch.cat((q, q), 1)[:, :16], torch.cat((slots, slots), 1)[:, :70]
    spread = valid.repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in (wide, long, spread))
    assert_attended(on_cpu(wide, cache, long, spread, scale), *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 16, 576)}, "takes queries in bfloat16 with 16 heads, got torch.float32 with 16"),
        ({"q": torch.zeros(8, 8, 576).bfloat16()}, "got torch.bfloat16 with 8; choose gluon"),
        ({"cache": torch.zeros(1, 64, 576)}, "takes a cache in fp8_ds_mla or bfloat16, got torch.float32"),
        ({"topk_slot": torch.zeros(8, 2049, dtype=torch.int32)}, "at most 2048 slots a token, got 2049"),
        ({"cache": torch.zeros(2 * 577).bfloat16().as_strided((2, 1, 576), (577, 576, 1))}, "one every 1154"),
    ],
)
def test_refusals(on_cpu, change, message):
    q, cache, slots, valid, _ = bf16_problem([8] * 8, 8, 64)
    arguments = {"q": q, "cache": cache, "topk_slot": slots, "num_valid": valid} | change
    with pytest.raises(ValueError, match=message):
        on_cpu(*arguments.values(), 1.0)


def test_products_overlap_and_registers_suffice(tmp_path):
    assert spilled_nbytes("sparse_mla_bf16_union_sm90", tmp_path) == [0]


def shared_problem(num_tokens, num_rows, overlap, cache_format="bfloat16"):
    """On a GPU, 2048 slots each; each token has such a share of those of the one before."""
    torch.manual_seed(1)
    num_others = round((1 - overlap) * 2048)
    drawn = torch.randint(num_rows, ((num_tokens - 1) * num_others + 2048,), device="cuda", dtype=torch.int32)
    cache = latent_cache(num_rows // 64, 64, cache_format)
    fill(cache)
    q = torch.randn(num_tokens, 16, 576, device="cuda", dtype=torch.bfloat16)
    valid = torch.full((num_tokens,), 2048, device="cuda", dtype=torch.int32)
    return q, cache.cuda(), drawn.unfold(0, 2048, num_others).sort(-1).values, valid, 0.04


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("cache_format", ["bfloat16", "fp8_ds_mla"])
@needs_library
@needs_hopper
def test_a_prefill(cache_format, overlap):
    """Slots that a token has again are among them."""
    q, cache, slots, valid, scale = shared_problem(4096 + 3, 32 << 10, overlap, cache_format)
    out, lse = sparse_mla_cuda_union.sparse_mla(q, cache, slots, valid, scale)
    num_whole = sparse_mla_cuda.num_whole_tokens(q, 2048)
    for rows in (slice(64), slice(2000, 2064), slice(num_whole, None)):
        arguments = q[rows], cache, slots[rows], valid[rows], scale
        assert_attended((out[rows], lse[rows]), *arguments, num_whole=0 if rows.stop is None else None)
    for _ in range(20):
        again, lse_again = sparse_mla_cuda_union.sparse_mla(q, cache, slots, valid, scale)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@needs_library
@needs_hopper
def test_counts_around_tiles():
    counts = [0, 1, 63, 64, 65, 127, 128, 129, 139, 1000, 2047, 2048, 2048, 0, 0, 0] * 65
    arguments = bf16_problem(counts[:-1], 2048, 4096, device="cuda")
    assert_attended(sparse_mla_cuda_union.sparse_mla(*arguments), *arguments)


@pytest.mark.parametrize("block_size", [16, 48, 256])
@pytest.mark.parametrize("cache_format", ["bfloat16", "fp8_ds_mla"])
@needs_library
@needs_hopper
def test_other_pages(cache_format, block_size):
    """Groups whose slots are nearly all of a few rows, and groups that share little."""
    counts = [(7 * token) % 300 for token in range(2000)]
    for num_rows in (320, 4096):
        arguments = problem(16, counts, 320, num_rows, block_size, device="cuda", cache_format=cache_format)
        num_whole = sparse_mla_cuda.num_whole_tokens(arguments[0], 320)
        assert_attended(sparse_mla_cuda_union.sparse_mla(*arguments), *arguments, num_whole)


@needs_library
@needs_hopper
def test_an_fp8_cache_of_which_too_many_pages_are_named(monkeypatch):
    arguments = shared_problem(2048, 32 << 10, 0.9, "fp8_ds_mla")
    together, _ = sparse_mla_cuda_union.sparse_mla(*arguments)
    monkeypatch.setattr(slot_union_cuda, "PLACED_NBYTES", 300 * 64 * 1152)
    alone, _ = sparse_mla_cuda.sparse_mla(*arguments)
    for _ in range(20):
        assert torch.equal(sparse_mla_cuda_union.sparse_mla(*arguments)[0], alone)
    assert not torch.equal(together, alone)


@pytest.mark.parametrize("cache_format", ["bfloat16", "fp8_ds_mla"])
@needs_library
@needs_hopper
def test_in_a_graph(cache_format):
    arguments = shared_problem(1026, 16 << 10, 0.8, cache_format)
    wanted = sparse_mla_cuda_union.sparse_mla(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sparse_mla_cuda_union.sparse_mla(*arguments)
    for _ in range(3):
        graph.replay()
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x, y)
