"""The kernel in CUDA C++: its arithmetic and its barriers on the CPU, and all of it on a GPU of SM 90."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.emulated import SOURCES, load_build
from kernels.sparse_mla_cuda_cases import SCALE, assert_near, kernel_on_cpu, needs_hopper, needs_library, problem
from vllm_dsv32.kernels import cuda_library, sparse_mla, sparse_mla_cuda
from vllm_dsv32.kernels.sparse_mla_cuda import launches

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return kernel_on_cpu("sparse_mla", tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.mark.parametrize("num_splits", sparse_mla_cuda.SPLITS)
def test_counts_around_tiles_and_splits_on_cpu(on_cpu, num_splits):
    arguments = problem(16, [0, 1, 63, 64, 65, 129, 512], 512, 1024)
    out, lse = on_cpu(*arguments, num_splits)
    assert_near((out, lse), sparse_mla.reference(arguments[0].float(), *arguments[1:]))
    assert not out[0].any()
    assert bool((lse[0] == -torch.inf).all())


@pytest.mark.parametrize("num_splits", [1, 4, 5])
def test_results_do_not_depend_on_the_order_of_threads(on_cpu, num_splits):
    arguments = problem(16, [0, 1, 63, 512, 0, 700, 1000, 65], 1024, 1024)
    out, lse = on_cpu(*arguments, num_splits)
    for seed in range(1, 4):  # of when each warp runs and each copy is done
        again, lse_again = on_cpu(*arguments, num_splits, seed)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize(
    ("num_heads", "block_size", "num_splits"), [(1, 64, 2), (1, 64, 6), (8, 16, 5), (17, 48, 3), (32, 256, 2)]
)
def test_other_heads_and_pages_on_cpu(on_cpu, num_heads, block_size, num_splits):
    arguments = problem(num_heads, [700, 64], 704, 1024, block_size)
    got = on_cpu(*arguments, num_splits)
    assert_near(got, sparse_mla.reference(arguments[0].float(), *arguments[1:]))


def test_all_lanes_may_arrive_on_cpu(on_cpu, tmp_path):
    """As the build for racecheck has it."""
    by_all_lanes = kernel_on_cpu("sparse_mla", tmp_path, "-DDSV32_ALL_LANES_ARRIVE")
    arguments = problem(16, [0, 63, 64, 700], 704, 1024)
    for num_splits in (1, 5):
        for got, wanted in zip(by_all_lanes(*arguments, num_splits), on_cpu(*arguments, num_splits), strict=True):
            assert torch.equal(got, wanted)


def test_the_library_builds_and_loads(tmp_path):
    build = load_build()
    if build.find_nvcc() is None:
        pytest.skip("needs nvcc")
    assert build.LIBRARY_NAME == cuda_library.LIBRARY_NAME
    library = build.build(tmp_path)
    # A process of its own: a library's operators can be registered once.
    check = (
        f"import pathlib; from vllm_dsv32.kernels import cuda_library as c; "
        f"assert c.refusal(pathlib.Path({str(library)!r})) is None; "
        f"import torch; print(torch.ops.vllm_dsv32.sparse_mla_fp8.default._schema)"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("vllm_dsv32::sparse_mla_fp8(Tensor q, Tensor cache")


@pytest.mark.parametrize("all_lanes_arrive", [False, True])
def test_the_build_passes_on_how_warps_arrive(monkeypatch, tmp_path, all_lanes_arrive):
    build, commands = load_build(), []

    def record(*command):
        commands.append(command)
        Path(command[-1]).touch()

    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "_run", record)
    build.build(tmp_path, all_lanes_arrive=all_lanes_arrive)
    kernels = [command for command in commands if any(word.endswith(".cu") for word in command)]
    sources = {Path(word).name for command in kernels for word in command if word.endswith(".cu")}
    assert sources == {path.name for path in SOURCES.glob("*.cu")}
    assert all(("-DDSV32_ALL_LANES_ARRIVE" in command) == all_lanes_arrive for command in kernels)


def test_without_nvcc_the_build_says_so(monkeypatch, tmp_path):
    build = load_build()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match=r"nvcc is neither in the path nor in /usr/local/cuda/bin"):
        build.build(tmp_path)


def test_a_library_that_is_not_there(tmp_path):
    assert "which was not built; in a checkout, python csrc/build.py" in cuda_library.refusal(tmp_path / "none.so")


def test_a_library_that_is_none(tmp_path):
    path = tmp_path / cuda_library.LIBRARY_NAME
    path.write_bytes(b"not a library")
    assert "cannot be loaded" in cuda_library.refusal(path)


def test_a_library_of_other_sources(monkeypatch, tmp_path):
    path = tmp_path / cuda_library.LIBRARY_NAME
    path.touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(cuda_library, "_OPERATORS", ("not_there", "nor_this"))
    assert "has no not_there, nor_this: it was built from other sources;" in cuda_library.refusal(path)


FEW_PASSED_OVER = [-1, 70, 0, -1, -1, 64, 3, 129, -1, -1, 0, 70, -1]
MANY_PASSED_OVER = [70, *[-1] * 92, 3, *[-1] * 98, 64, *[-1] * 120]


@pytest.mark.parametrize("counts", [FEW_PASSED_OVER, MANY_PASSED_OVER], ids=["few", "many"])
def test_tokens_of_less_than_no_keys_are_passed_over_on_cpu(on_cpu, counts):
    """Where they are not split. At every place among those of a block: the first, in a row, the last.

    Blocks look over 32 of their tokens at once: many in a row are as many, one less, one more.
    """
    q, cache, slots, valid, scale = problem(16, [max(0, count) for count in counts], 130, 512)
    counts = torch.tensor(counts, dtype=torch.int32)
    out, lse = on_cpu(q, cache, slots, counts, scale, 1)
    passed_over = counts < 0
    assert bool(out[passed_over].isnan().all())
    assert bool(lse[passed_over].isnan().all())
    wanted = sparse_mla.reference(q.float(), cache, slots, valid, scale)
    assert_near([x[~passed_over] for x in (out, lse)], [x[~passed_over] for x in wanted])


@pytest.mark.parametrize("name", ["sparse_mla_fp8", "sparse_mla_fp8_wide", "sparse_mla_bf16_wide"])
@needs_library
def test_nothing_is_run_on_tensors_without_memory(name):
    q = torch.empty(3, 16, 576, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(4, 64, 656, dtype=torch.uint8, device="meta")
    if "bf16" in name:
        cache = torch.empty(4, 64, 576, dtype=torch.bfloat16, device="meta")
    slots = torch.empty(3, 128, dtype=torch.int32, device="meta")
    out, lse = torch.empty_like(q[..., :512]), torch.empty(3, 16, device="meta")
    operator = getattr(torch.ops.vllm_dsv32, name)
    assert operator(q, cache, slots, slots[:, 0], 1.0, 1, out, lse) is None


@pytest.mark.parametrize(
    ("q", "cache", "message"),
    [
        (torch.zeros(1, 4, 576), torch.zeros(1, 16, 656, dtype=torch.uint8), "takes queries in bfloat16"),
        (
            torch.zeros(1, 4, 576).bfloat16(),
            torch.zeros(1, 16, 576),
            "takes a cache in fp8_ds_mla, or in bfloat16 with more than 32 heads, got torch.float32 with 4;",
        ),
        (
            torch.zeros(1, 32, 576).bfloat16(),
            torch.zeros(1, 16, 576).bfloat16(),
            "got torch.bfloat16 with 32; choose gluon",
        ),
        (
            torch.zeros(1, 33, 576).bfloat16(),
            torch.zeros(2 * (16 * 576 + 4)).bfloat16().as_strided((2, 16, 576), (16 * 576 + 4, 576, 1)),
            "expected pages at multiples of 16 bytes, got one every 18440",
        ),
        (
            torch.zeros(1, 4, 576).bfloat16(),
            torch.zeros(2 * (16 * 656 + 8), dtype=torch.uint8).as_strided((2, 16, 656), (16 * 656 + 8, 656, 1)),
            "expected pages at multiples of 16 bytes, got one every 10504",
        ),
    ],
)
def test_what_it_does_not_take(q, cache, message):
    with pytest.raises(ValueError, match=message):
        sparse_mla_cuda.sparse_mla(q, cache, torch.zeros(1, 1).int(), torch.ones(1).int(), SCALE)


def test_splits_fill_the_gpu():
    concurrency = (132, 66, 42, 30, 24, 18, 15, 7)
    chosen = {1: 16, 7: 16, 8: 8, 16: 6, 18: 6, 24: 5, 30: 4, 32: 3, 42: 3, 43: 2, 64: 2, 84: 3, 128: 1, 256: 1}
    for tokens, splits in chosen.items():
        assert launches(tokens, 1, 2048, concurrency) == ((tokens, splits),)
    assert launches(16, 2, 2048, concurrency) == ((16, 3),)
    assert launches(1, 1, 64, concurrency) == ((1, 1),)
    assert launches(1, 1, 320, concurrency) == ((1, 5),)
    assert launches(1, 1, 2048, (132, *(0 for _ in concurrency[1:]))) == ((1, 1),)


def test_tokens_that_would_keep_few_blocks_busy_are_a_launch_of_their_own():
    concurrency = (132, 66, 42, 30, 24, 18, 15, 7)
    assert launches(133, 1, 2048, concurrency) == ((132, 1), (1, 16))
    assert launches(160, 1, 2048, concurrency) == ((132, 1), (28, 4))
    assert launches(4096, 1, 2048, concurrency) == ((4092, 1), (4, 16))
    assert launches(4096, 2, 2048, concurrency) == ((4092, 1), (4, 8))
    for tokens in (264, 1000, 4096, 8192):
        for programs in (1, 2):
            assert sum(count for count, _ in launches(tokens, programs, 2048, concurrency)) == tokens
    assert launches(200, 1, 2048, concurrency) == ((200, 1),)  # a second launch would take as long
    assert launches(133, 1, 64, concurrency) == ((133, 1),)  # nothing to split


@needs_library
def test_the_library_takes_these_splits_and_no_others():
    taken = []
    for num_splits in range(-1, 34):
        try:
            torch.ops.vllm_dsv32.sparse_mla_fp8_concurrency(num_splits)
        except RuntimeError as error:  # of another kind where there is no GPU
            if f"num_splits: expected 1 to 6, 8 or 16, got {num_splits}" in str(error):
                continue
        taken.append(num_splits)
    assert tuple(taken) == sparse_mla_cuda.SPLITS


@pytest.mark.parametrize("num_splits", [None, *sparse_mla_cuda.SPLITS])
@pytest.mark.parametrize("num_heads", [1, 8, 16, 17, 32])
@needs_library
@needs_hopper
def test_counts_around_tiles_and_splits(monkeypatch, num_heads, num_splits):
    if num_splits is not None:
        monkeypatch.setattr(sparse_mla_cuda, "launches", lambda num_tokens, *_: ((num_tokens, num_splits),))
    num_valid = [0, 1, 63, 64, 65, 127, 128, 129, 139, 1000, 2047, 2048, 2048]
    arguments = problem(num_heads, num_valid, 2048, 4096, device="cuda")
    out, lse = sparse_mla_cuda.sparse_mla(*arguments)
    assert_near((out, lse), sparse_mla.reference(arguments[0].float(), *arguments[1:]))
    assert not out[0].any()
    assert bool((lse[0] == -torch.inf).all())
    for _ in range(20):
        again, lse_again = sparse_mla_cuda.sparse_mla(*arguments)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("num_heads", [16, 32])
@needs_library
@needs_hopper
def test_more_tokens_than_blocks(num_heads):
    num_valid = [min(7 * token, 2048) for token in range(139)]
    arguments = problem(num_heads, num_valid, 2048, 4096, device="cuda")
    got = sparse_mla_cuda.sparse_mla(*arguments)
    assert_near(got, sparse_mla.reference(arguments[0].float(), *arguments[1:]))
    again = sparse_mla_cuda.sparse_mla(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(again, got, strict=True))


@pytest.mark.parametrize("block_size", [16, 48, 256])
@needs_library
@needs_hopper
def test_other_pages(block_size):
    arguments = problem(16, [300, 64, 2000], 2048, 4096, block_size, device="cuda")
    got = sparse_mla_cuda.sparse_mla(*arguments)
    assert_near(got, sparse_mla.reference(arguments[0].float(), *arguments[1:]))
