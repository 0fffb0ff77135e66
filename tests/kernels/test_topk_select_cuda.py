"""The selection in CUDA C++: small blocks of it on the CPU, and all of it on a GPU of SM 90."""

import ctypes
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from kernels.emulated import emulated
from kernels.inputs import cuda_copy
from vllm_dsv32.kernels import cuda_library, topk_select, topk_select_cuda, topk_select_triton
from vllm_dsv32.kernels.topk_select_cuda import CAPACITY, CLUSTER_SIZES, cluster_size

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_library = pytest.mark.skipif(cuda_library.refusal() is not None, reason=str(cuda_library.refusal()))


@dataclass(frozen=True)
class Runner:
    """The kernel on some device, and the sizes at which it changes its ways there."""

    run: Callable[..., None]
    k: int
    capacity: int
    num_sample_words: int
    tile: int
    width: int
    cluster_sizes: tuple[int, ...]

    def __call__(self, logits, num_keys, k, size, request_ids=None, table=None, block_size=1 << 30, seed=0):
        """Slots are positions unless a table is given."""
        num_keys = torch.tensor(num_keys, dtype=torch.int32)
        if table is None:
            table, request_ids = torch.zeros(1, 1, dtype=torch.int32), torch.zeros_like(num_keys)
        out = torch.full((len(num_keys), k), 12345, dtype=torch.int32)
        self.run(logits, num_keys, request_ids, table, block_size, out, size, seed)
        return out


class Arguments(ctypes.Structure):
    """TopkSelectArguments of csrc/topk_select_sm90.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "num_keys", "request_ids", "block_table", "topk_slot")),
        *((name, ctypes.c_int64) for name in ("logits_stride", "block_table_stride", "topk_slot_stride")),
        *((name, ctypes.c_int) for name in ("num_rows", "length", "k", "block_size")),
    )


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Callable[..., None]:
    """The kernel under the emulator, with small blocks unless told otherwise."""
    function = emulated("topk_select", tmp_path_factory.mktemp("cuda_on_cpu")).topk_select_on_cpu
    function.restype = ctypes.c_char_p

    def run(logits, num_keys, request_ids, table, block_size, out, size, seed, small=True):
        pointers = (x.data_ptr() for x in (logits, num_keys, request_ids, table, out))
        sizes = (logits.stride(0), table.stride(0), out.stride(0), *logits.shape, out.shape[1], block_size)
        arguments = Arguments(*pointers, *sizes)
        assert function(ctypes.byref(arguments), size, small, seed) is None

    return run


def on_gpu(logits, num_keys, request_ids, table, block_size, out, size, seed) -> None:
    moved = [cuda_copy(x) for x in (logits, num_keys, request_ids, table)]
    results = []
    for _ in range(5):
        results.append(out.cuda())
        torch.ops.vllm_dsv32.topk_select(*moved, block_size, size, results[-1])
    assert all(torch.equal(result, results[0]) for result in results)
    out.copy_(results[0])


@pytest.fixture(params=["on_cpu", "on_gpu"])
def runner(request) -> Runner:
    if request.param == "on_cpu":
        run, sizes = request.getfixturevalue("on_cpu"), (1, 2, 8)
        return Runner(run, 64, capacity=512, num_sample_words=64, tile=1024, width=3000, cluster_sizes=sizes)
    if not HAS_HOPPER or cuda_library.refusal() is not None:
        pytest.skip("needs a GPU of SM 90, and the library")
    return Runner(on_gpu, 2048, CAPACITY, 1024, tile=16384, width=163_840, cluster_sizes=CLUSTER_SIZES)


def wanted(logits, num_keys, k, request_ids=None, table=None, block_size=64) -> torch.Tensor:
    """Slots; without a table, positions."""
    device = "cuda" if HAS_HOPPER else "cpu"  # where long rows take long
    if table is None:
        request_ids = torch.zeros(len(num_keys), dtype=torch.int32)
        table = torch.arange(-(-logits.shape[1] // block_size), dtype=torch.int32).unsqueeze(0)
    arguments = (logits, torch.tensor(num_keys, dtype=torch.int32), request_ids, table)
    topk_slot = torch.empty(len(num_keys), k, dtype=torch.int32, device=device)
    topk_select.reference(*(x.to(device) for x in arguments), block_size, topk_slot)
    return topk_slot.cpu()


def sampled(runner: Runner, width: int) -> torch.Tensor:
    """Which logits of a row the threshold is guessed from."""
    words = torch.arange(runner.num_sample_words) * (width // 4) // runner.num_sample_words
    mask = torch.zeros(width, dtype=torch.bool)
    mask[(words.unsqueeze(1) * 4 + torch.arange(4)).flatten()] = True
    return mask


def kinds_of_rows(runner: Runner, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    normal = torch.randn(width, generator=generator)
    place = torch.arange(width)
    sample = sampled(runner, width)
    # So few that fewer than k reach what they make expect.
    few_of_sample = sample & (sample.cumsum(0) % 7 == 0)
    return {
        "random": normal,
        "rising": normal.sort().values,
        "falling": normal.sort(descending=True).values,
        "few values": torch.randint(-1, 2, (width,), generator=generator).float(),
        "of every magnitude": normal * 10.0 ** torch.linspace(-42, 38, width),
        "from the lowest to the highest": normal.sign() * torch.finfo(torch.float32).max,
        "infinities at both ends": torch.where(normal.abs() > 1, normal * math.inf, normal),
        "all equal": torch.full((width,), -0.0),
        "both zeros, half below": torch.where(normal > 0, torch.where(place % 2 == 0, 0.0, -0.0), -1.0),
        "all NaN": torch.full((width,), math.nan),
        "all infinite": torch.full((width,), math.inf),
        "NaN among values": torch.where(place % 3 == 0, math.nan, normal),
        "fewer values than k": torch.where(place % (width // 9) == 5, normal, -math.inf),
        "fewer values than k, NaN": torch.where(place % (width // 9) == 5, normal, math.nan),
        "one share has all": torch.where((place > width // 3) & (place < width // 2), normal + 50, normal),
        "outliers": torch.where(place % (width // 5) == 3, 1e30, normal),
        "equal but for outliers": torch.where(place % (width // 5) == 3, 1e30, 1.0),
        "one unit apart": torch.where(place == width - 1, 1e-45, 0.0),
        "subnormal": normal * 1e-41,
        "a sample above the rest": torch.where(sample, normal + 9, normal),
        "a few of the sample above the rest": torch.where(few_of_sample, 9.0, normal),
        "a sample below the rest": torch.where(sample, -9.0, normal),
    }


def test_any_kind_of_row(runner, generator):
    width = runner.width
    rows = kinds_of_rows(runner, width, generator)
    logits = torch.stack(list(rows.values()))
    num_keys = [width] * len(rows)
    expected = wanted(logits, num_keys, runner.k)
    for size in runner.cluster_sizes:
        got = runner(logits, num_keys, runner.k, size)
        assert [name for name, right in zip(rows, (got == expected).all(1), strict=True) if not right] == []


def test_any_kind_of_row_that_one_block_holds(runner, generator):
    width = runner.capacity - 3
    rows = kinds_of_rows(runner, width, generator)
    logits = torch.stack(list(rows.values()))
    num_keys = [width] * len(rows)
    got = runner(logits, num_keys, runner.k, 1)
    expected = wanted(logits, num_keys, runner.k)
    assert [name for name, right in zip(rows, (got == expected).all(1), strict=True) if not right] == []


@pytest.mark.parametrize("pitch", [0, 1])
@pytest.mark.parametrize("few", [None, 1, 17])
def test_lengths(runner, generator, few, pitch):
    """Around k, what a block holds, shares and tiles; rows that are aligned or not; poison behind each."""
    k, capacity, tile = few or runner.k, runner.capacity, runner.tile
    for size in runner.cluster_sizes:
        sizes = {k, capacity // 2, capacity, tile, min(2 * tile, runner.width - 1)}
        sizes |= {min(tile * size, runner.width - 1), size * (capacity // 8 + 4)}
        num_keys = sorted({0, 1, 2, runner.width} | {n + d for n in sizes for d in (-1, 0, 1) if n + d >= 0})
        memory = torch.randn(len(num_keys), -(-runner.width // 4) * 4 + pitch, generator=generator)
        logits = memory[:, pitch : pitch + runner.width]
        for row, n in enumerate(num_keys):
            logits[row, n:] = (math.inf, math.nan)[row % 2]
        got = runner(logits, num_keys, k, size)
        same = (got == wanted(logits, num_keys, k)).all(1)
        assert [n for n, right in zip(num_keys, same, strict=True) if not right] == []


@pytest.mark.parametrize("block_size", [1, 16, 48, 64, 100])
def test_slots_of_several_requests(runner, generator, block_size):
    """Blocks of which nothing is selected, and those behind a request's last, have no place in the cache."""
    k, width = runner.k, runner.width
    num_keys = [width, runner.capacity - 1, k - 3, width - 7, k + 1, 0]
    logits = torch.randn(len(num_keys), width, generator=generator)
    request_ids = torch.tensor([3, 1, 1, 0, 2, 2], dtype=torch.int32)
    num_blocks = -(-width // block_size)
    table = torch.randperm(4 * num_blocks, generator=generator).view(4, num_blocks).int()
    table = torch.nn.functional.pad(table, (0, 3))[:, : num_blocks + 1]  # rows that lie apart
    used = torch.zeros_like(table, dtype=torch.bool)
    positions = wanted(logits, num_keys, k)
    for row, request in enumerate(request_ids.tolist()):
        used[request, positions[row][positions[row] >= 0].long() // block_size] = True
    table[~used] = 2**31 - 1
    expected = wanted(logits, num_keys, k, request_ids, table, block_size)
    for size in runner.cluster_sizes:
        assert torch.equal(runner(logits, num_keys, k, size, request_ids, table, block_size), expected)


def test_results_do_not_depend_on_the_order_of_threads(runner, generator):
    logits = torch.randn(3, runner.width, generator=generator)
    logits[1] = (logits[1] * 2).round()
    num_keys = [runner.width, runner.width, runner.capacity]
    for size in runner.cluster_sizes:
        for seed in (1, 2, 3):
            got = runner(logits, num_keys, runner.k, size, seed=seed)
            assert torch.equal(got, wanted(logits, num_keys, runner.k))


def test_real_blocks_on_cpu(on_cpu, generator):
    logits = torch.randn(3, 20_000, generator=generator)
    logits[1] = (logits[1] * 3).round()
    num_keys = [20_000, 19_999, 8192]
    runner = Runner(partial(on_cpu, small=False), 2048, CAPACITY, 1024, 16384, 20_000, ())
    for size in (1, 2):
        got = runner(logits, num_keys, 2048, size)
        assert torch.equal(got, wanted(logits, num_keys, 2048))


def test_nothing_behind_a_row_is_read(on_cpu, generator):
    """Behind the last key lies memory that may not be read; rows of at most k keys lie in it."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 5 * page)
    floats = torch.frombuffer(memory, dtype=torch.float32)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    behind = ctypes.c_void_p(floats.data_ptr() + 4 * page)
    assert protect(behind, ctypes.c_size_t(page), 0) == 0
    runner = Runner(on_cpu, 64, 512, 64, 1024, 0, ())
    try:
        end = 4 * page // 4
        for n in (end, end - 1, end - 2, end - 3, 400, 65):
            row = floats[end - n : end]
            row.copy_(torch.randn(n, generator=generator))
            logits = floats.as_strided((1, n + 100), (n + 100, 1), end - n)
            for size in (1, 4):
                got = runner(logits, [n], 64, size)
                assert torch.equal(got, wanted(row.unsqueeze(0), [n], 64))
        unread = floats.as_strided((2, 64), (64, 1), end)
        assert runner(unread, [64, 3], 64, 1)[:, :4].tolist() == [[0, 1, 2, 3], [0, 1, 2, -1]]
    finally:
        assert protect(behind, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE) == 0


def test_a_larger_k_is_refused():
    ints = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 2048, got 2049; choose triton"):
        topk_select_cuda.topk_select(
            torch.zeros(1, 9), ints, ints, ints.view(1, 1), 64, torch.empty(1, 2049, dtype=torch.int32)
        )


def test_the_rows_of_a_prefill_are_tritons(monkeypatch, generator):
    monkeypatch.setattr(cuda_library, "require", lambda: None)
    monkeypatch.setattr(topk_select_cuda, "_concurrency", lambda device: (2, 1, 0, 0))
    logits, ids = torch.randn(5, 100, generator=generator), torch.zeros(5, dtype=torch.int32)
    out = torch.empty(5, 8, dtype=torch.int32)
    given = (logits, ids + 100, ids, ids[None, :2], 64, out)
    taken = []
    monkeypatch.setattr(topk_select_triton, "topk_select", lambda *arguments: taken.extend(arguments))
    topk_select_cuda.topk_select(*given)
    assert all(a is b for a, b in zip(taken, given, strict=True))


@needs_library
def test_nothing_is_run_on_tensors_without_memory():
    logits = torch.empty(3, 100, device="meta")
    ints = torch.empty(3, 8, device="meta", dtype=torch.int32)
    assert torch.ops.vllm_dsv32.topk_select(logits, ints[:, 0], ints[:, 0], ints, 64, 1, ints) is None


@pytest.mark.skipif(not HAS_HOPPER, reason="needs a GPU of SM 90")
@needs_library
def test_other_types_and_shapes_are_refused():
    ints = torch.zeros(2, 3, device="cuda", dtype=torch.int32)
    logits, row, out = torch.zeros(2, 9, device="cuda"), ints[:, 0].contiguous(), torch.empty_like(ints)
    with pytest.raises(RuntimeError, match=r"logits: expected Float in two dimensions .*, got Half \[2, 9\]"):
        topk_select_cuda.topk_select(logits.half(), row, row, ints, 64, out)
    with pytest.raises(RuntimeError, match=r"num_keys: expected Int \[2\], got Int \[3\]"):
        topk_select_cuda.topk_select(logits, ints[0], row, ints, 64, out)


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (16_384, (1, 1, 1, 1)),
        (24_575, (1, 1, 1, 1)),
        (24_576, (2, 2, 2, 1)),
        (49_152, (4, 4, 2, 1)),
        (98_304, (8, 4, 2, 1)),
        (131_072, (8, 4, 2, 1)),
        (163_840, (8, 4, 2, 1)),
        (1_000_000, (8, 4, 2, 1)),
    ],
)
def test_clusters_that_all_run_at_once(length, sizes):
    concurrency = (132, 66, 30, 15)
    assert tuple(cluster_size(rows, length, concurrency) for rows in (1, 16, 64, 128)) == sizes
    assert cluster_size(8192, length, concurrency) == 1
    assert cluster_size(1, length, (132, 0, 0, 0)) == 1


@pytest.mark.skipif(not HAS_HOPPER, reason="needs a GPU of SM 90")
@needs_library
@pytest.mark.parametrize("num_rows", [1, 4, 64, 200, 300])
def test_chosen_cluster_sizes(generator, num_rows):
    logits = torch.randn(num_rows, 40_000, generator=generator)
    num_keys = torch.randint(0, 40_001, (num_rows,), generator=generator, dtype=torch.int32)
    out = torch.empty(num_rows, 2048, dtype=torch.int32, device="cuda")
    requests, table = torch.zeros_like(num_keys).cuda(), torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    topk_select_cuda.topk_select(logits.cuda(), num_keys.cuda(), requests, table, 1 << 30, out)
    assert torch.equal(out.cpu(), wanted(logits, num_keys.tolist(), 2048))
