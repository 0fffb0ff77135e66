"""The kernel in CUDA C++ for prefill: arithmetic, copies and barriers on the CPU, all of it on a GPU of SM 90."""

import ctypes

import pytest
import torch

from kernels.emulated import emulated, spilled_nbytes
from kernels.index_logits_cases import BATCHES, assert_near, needs_hopper, problem
from kernels.inputs import index_cache
from vllm_dsv32.kernels import (
    cuda_library,
    index_logits,
    index_logits_cuda,
    index_logits_gluon,
    index_logits_triton,
    warmup,
)
from vllm_dsv32.layout import index_key_views

needs_library = pytest.mark.skipif(cuda_library.refusal() is not None, reason=str(cuda_library.refusal()))
UNWRITTEN = 12345.0


class Arguments(ctypes.Structure):
    """IndexLogitsArguments of csrc/index_logits_sm90.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "weights", "cache", "block_table", "request_ids", "num_keys", "logits")
        ),
        *((name, ctypes.c_int64) for name in ("page_nbytes", "block_table_stride", "logits_stride")),
        *((name, ctypes.c_int) for name in ("num_rows", "num_blocks", "block_size", "length")),
    )


def kernel_on_cpu(directory, *options):
    """The operator, on memory in which one sees what was written."""
    function = emulated("index_logits", directory, *options).index_logits_on_cpu
    function.restype = ctypes.c_char_p

    def call(q, weights, cache, table, ids, keys, width, seed=0):
        logits = torch.full((len(ids), width + 5), UNWRITTEN)
        tensors = (q, weights, cache, table, ids, keys, logits)
        arguments = Arguments(
            *(x.data_ptr() for x in tensors),
            *(cache.stride(0), table.stride(0), logits.stride(0)),
            *(len(ids), cache.shape[0], cache.shape[1], width),
        )
        assert function(ctypes.byref(arguments), seed) is None
        return logits

    return call


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return kernel_on_cpu(tmp_path_factory.mktemp("cuda_on_cpu"))


def assert_right(got, arguments, tolerance):
    """What a row sees is near the reference, to a part of the sum of magnitudes; nothing else is written."""
    q, weights, *rest, num_keys, width = arguments
    visible = torch.arange(got.shape[1], device=got.device) < num_keys.unsqueeze(1)
    assert bool((got[~visible] == UNWRITTEN).all())
    visible = visible[:, :width]
    magnitude = index_logits.reference(q, weights.abs(), *rest, num_keys, width)[visible]
    wanted = index_logits.reference(*arguments)[visible]
    assert_near(got[:, :width][visible], wanted, tolerance * magnitude)


SMALL = (
    "one token, one key",
    "lengths around tiles, steps and blocks",
    "a prompt",
    "all kinds",
    "padding in front, between and behind",
    "nothing to see",
)


@pytest.mark.parametrize("batch", SMALL)
def test_rows_and_keys_around_tiles_on_cpu(on_cpu, batch):
    arguments = problem(BATCHES[batch], device="cpu")
    assert_right(on_cpu(*arguments), arguments, 1e-5)


@pytest.mark.parametrize(("block_size", "gap_nbytes"), [(64, 16), (128, 0), (192, 33_792)])
def test_other_and_interleaved_pages_on_cpu(on_cpu, block_size, gap_nbytes):
    arguments = problem([(1, 9, 300), (0, 10, 200)], block_size, gap_nbytes, device="cpu")
    assert_right(on_cpu(*arguments), arguments, 1e-5)


def test_more_tiles_than_a_ring_has_stages_on_cpu(on_cpu):
    arguments = problem([(0, 2, 2500)], device="cpu")
    assert_right(on_cpu(*arguments), arguments, 1e-5)


def test_rows_of_several_threads_on_cpu(on_cpu):
    """Tiles of rows are more than threads, each of which counts several; most see nothing."""
    batch = [(0, 3, 70), (1, 3100, 0), (2, 5, 150), (3, 2, 0), (4, 40, 64)]
    arguments = problem(batch, device="cpu")
    assert_right(on_cpu(*arguments), arguments, 1e-5)


def test_results_do_not_depend_on_the_order_of_threads(on_cpu):
    arguments = problem([(0, 5, 300), (1, 6, 70), (2, 1, 129)], device="cpu")
    logits = on_cpu(*arguments)
    for seed in range(1, 5):  # of when each warp runs and each copy and each product is carried out
        assert torch.equal(on_cpu(*arguments, seed), logits)


def test_all_lanes_may_arrive_on_cpu(on_cpu, tmp_path):
    """As the build for racecheck has it."""
    by_all_lanes = kernel_on_cpu(tmp_path, "-DDSV32_ALL_LANES_ARRIVE")
    arguments = problem([(0, 5, 100), (1, 6, 70)], device="cpu")
    assert torch.equal(by_all_lanes(*arguments), on_cpu(*arguments))


def test_every_byte_is_multiplied_exactly_on_cpu(on_cpu):
    """Of each key one value is not zero, so that no sum rounds."""
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()]
    cache = index_cache(4, 64, fill=0)
    views = index_key_views(cache)
    for slot, value in enumerate(values):
        views.key_fp8[slot // 64, slot % 64, slot % 128] = value
    views.key_scale.fill_(2.0)
    q = torch.zeros(8, 64, 128).to(torch.float8_e4m3fn)
    q_values = torch.tensor([448.0, -3.25, 2.0**-6, -7 * 2.0**-9, 1.0, -1.0, 0.5, 3.0]).to(torch.float8_e4m3fn)
    for row, value in enumerate(q_values):
        q[row, 8 * row + row] = value
    ids, keys = torch.zeros(8, dtype=torch.int32), torch.full((8,), len(values), dtype=torch.int32)
    table = torch.arange(4, dtype=torch.int32).unsqueeze(0)
    got = on_cpu(q, torch.full((8, 64), 3.0), cache, table, ids, keys, len(values))[:, : len(values)]
    assert torch.equal(got, 6 * (q_values.float().unsqueeze(1) * values.float()).relu())


def test_what_is_not_finite_stays_where_it_is_on_cpu(on_cpu):
    """Of a key and of a scale its column, of a query and of a weight its row."""
    q, weights, cache, table, _, keys, _ = arguments = problem([(0, 6, 150), (1, 5, 100)], device="cpu")
    views = index_key_views(cache)
    views.key_fp8.view(torch.uint8)[int(table[0, 1]), 2, 5] = 0x7F
    views.key_scale[int(table[1, 0]), 63] = torch.nan
    q.view(torch.uint8)[1, 63, 7] = 0x7F
    weights[3, 0] = torch.nan
    got = on_cpu(*arguments)
    assert_right(got, arguments, 1e-5)
    assert got[0, : keys[0]].isnan().nonzero().flatten().tolist() == [66]
    assert bool(got[[1, 3], :140].isnan().all())
    assert got[7, : keys[7]].isnan().nonzero().flatten().tolist() == [63]


def test_products_overlap_and_registers_suffice(tmp_path):
    assert spilled_nbytes("index_logits_sm90", tmp_path) == [0]


@pytest.mark.parametrize(
    ("num_rows", "num_requests", "block_size", "gap_nbytes"),
    [(7, 1, 64, 0), (15, 2, 64, 0), (16, 2, 48, 0), (16, 2, 64, 4)],
    ids=["few rows", "few rows a request", "blocks", "page stride"],
)
def test_what_is_left_to_gluon(monkeypatch, num_rows, num_requests, block_size, gap_nbytes):
    """With the same arguments, whose result is returned."""
    monkeypatch.setattr(cuda_library, "require", lambda: None)
    monkeypatch.setattr(index_logits_gluon, "index_logits", lambda *arguments: arguments)
    per_row = torch.zeros(num_rows, dtype=torch.int32)
    arguments = (
        torch.zeros(num_rows, 64, 128).to(torch.float8_e4m3fn),
        torch.zeros(num_rows, 64),
        index_cache(4, block_size, gap_nbytes=gap_nbytes),
        torch.zeros(num_requests, 2, dtype=torch.int32),
        per_row,
        per_row,
        70,
    )
    assert all(
        got is given for got, given in zip(index_logits_cuda.index_logits(*arguments), arguments, strict=True)
    )


def test_warming_up_compiles_what_is_left_to_gluon():
    def kernels(batches):
        left = ((r, n) for r, n in batches if n < index_logits_cuda.MIN_ROWS * r)
        tilings = (index_logits_gluon.tiling(num_tokens, num_requests, 132) for num_requests, num_tokens in left)
        return {tiles and (tiles.num_rows, tiles.max_registers) for tiles in tilings}

    assert kernels(warmup._batches(8192, 256)) == kernels(
        (r, n) for r in range(1, 257) for n in (*range(r, 9 * r), 8192)
    )


def test_other_numbers_of_heads_are_refused():
    one = torch.zeros(1, 1).int()
    q = torch.zeros(1, 32, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="takes 64 heads, got 32"):
        index_logits_cuda.index_logits(q, q[..., 0].float(), index_cache(1, 64), one, one[0], one[0], 1)


@pytest.fixture
def on_gpu(monkeypatch):
    """The operator whatever the batch, on memory in which one sees what was written."""

    def new_logits(num_rows, max_num_keys, device):
        return torch.full((num_rows, max_num_keys + 5), UNWRITTEN, device=device)[:, :max_num_keys]

    monkeypatch.setattr(index_logits_triton, "new_logits", new_logits)
    monkeypatch.setattr(index_logits_cuda, "MIN_ROWS", 0)
    return lambda *arguments: index_logits_cuda.index_logits(*arguments)._base


def assert_right_on_gpu(kernel, arguments):
    got = kernel(*arguments)
    assert_right(got, arguments, 1e-3)  # fp8 products are added with fewer bits than float32 has
    num_keys, width = arguments[-2:]
    visible = torch.arange(width, device="cuda") < num_keys.unsqueeze(1)
    magnitude = index_logits.reference(arguments[0], arguments[1].abs(), *arguments[2:])[visible]
    # The Triton kernel has the same products, and sums them in another order.
    assert_near(got[:, :width][visible], index_logits_triton.index_logits(*arguments)[visible], 1e-5 * magnitude)
    for _ in range(20):
        assert torch.equal(kernel(*arguments).view(torch.int32), got.view(torch.int32))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@needs_library
@needs_hopper
def test_rows_and_keys_around_tiles(on_gpu, batch):
    assert_right_on_gpu(on_gpu, problem(batch))


@pytest.mark.parametrize("gap_nbytes", [16, 128, 33_792])
@pytest.mark.parametrize("block_size", [64, 128, 192])
@needs_library
@needs_hopper
def test_other_and_interleaved_pages(on_gpu, block_size, gap_nbytes):
    assert_right_on_gpu(on_gpu, problem(BATCHES["all kinds"], block_size, gap_nbytes))


@needs_library
@needs_hopper
def test_a_prefill_of_several_prompts(on_gpu):
    assert_right_on_gpu(on_gpu, problem([(0, 1500, 1500), (1, 700, 9000), (2, 0, 0), (3, 1, 5000), (4, 900, 901)]))
