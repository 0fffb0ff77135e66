"""The profile of a decode step: what runs on both sides, names of kernels, and the steps that are left."""

from types import SimpleNamespace

import gpu_profile
import pytest
from decode_profile import figures_of, main, rows_of
from engine_runs.timed_engine import TimedEngine

KERNELS = {
    "plugin": {"gemm": (100.0, 8.0), "attend": (40.0, 4.0), "tiny": (0.1, 1.0)},
    "in-tree": {"gemm": (104.0, 8.0), "flash": (90.0, 4.0), "remap": (6.0, 4.0)},
}


def test_what_both_sides_run_is_told_from_what_one_does():
    figures = {figure.name: figure.value for figure in figures_of(KERNELS)}
    assert figures == {
        "plugin, all kernels": pytest.approx(140.1),
        "plugin, kernels that run on both sides": 100.0,
        "plugin, kernels of this side alone": pytest.approx(40.1),
        "in-tree, all kernels": 200.0,
        "in-tree, kernels that run on both sides": 104.0,
        "in-tree, kernels of this side alone": 96.0,
    }


def test_rows_begin_with_the_slowest_kernel():
    rows = rows_of(KERNELS)
    assert [row["kernel"] for row in rows] == ["gemm", "flash", "attend", "remap"]
    assert rows[2] == {
        "kernel": "attend",
        "us, plugin": 40.0,
        "launches, plugin": 4.0,
        "us, in-tree": 0.0,
        "launches, in-tree": 0.0,
    }


@pytest.mark.parametrize(
    ("launches", "added"),
    [
        ([], []),
        ([(0, 4, "a"), (5, 6, "b")], [4, 1]),
        ([(0, 4, "a"), (1, 6, "waits for a"), (2, 7, "waits for both")], [4, 2, 1]),
        ([(0, 9, "a"), (1, 3, "beside a"), (8, 10, "b")], [9, 0, 1]),
    ],
)
def test_of_kernels_that_overlap_no_time_counts_twice(launches, added):
    assert gpu_profile.times_added(launches) == [
        (name, us) for (_, _, name), us in zip(launches, added, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_prepare_kernel", "_prepare_kernel"),
        (
            "void dsv32::(anonymous namespace)::topk_select_kernel<2048>(dsv32::Args, int)",
            "topk_select_kernel",
        ),
        ("dsv32::wide::<unnamed>::sparse_mla_fp8_wide_kernel(SparseMlaArguments)", "sparse_mla_fp8_wide_kernel"),
        ("void cutlass::device_kernel<vllm::cutlass_3x_gemm<cutlass::bfloat16_t, 1> >(Params)", "cutlass_3x_gemm"),
        ("nvjet_sm90_tst_256x16_64x6_2x1_v_bz_TNT", "nvjet_sm90_tst_256x16_64x6_2x1_v_bz_TNT"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_names_of_kernels_are_shortened(name, short):
    assert gpu_profile.short_name(name) == short


def test_a_step_is_the_difference_of_a_long_and_a_short_answer(monkeypatch):
    engine = TimedEngine.__new__(TimedEngine)
    engine._step_tokens, engine._params = 100, SimpleNamespace
    engine._one, engine._many = (SimpleNamespace(max_tokens=num) for num in (1, 257))
    profiled = []

    def run(rows, params):
        profiled.append(params.max_tokens)
        return [SimpleNamespace(prompt_token_ids=row, num_cached_tokens=len(row)) for row in rows]

    def launches_of(call):
        call()
        steps = profiled[-1]  # a prefill, which samples the first token, and the others
        return [("prefill", 7.0), *[("attend", 2.0), ("gemm", 3.0), ("gemm", 3.5)] * (steps - 1), ("copy", 1.0)]

    engine._run = run
    monkeypatch.setattr(gpu_profile, "launches_of", launches_of)
    kernels = engine.profile_decode([[1, 2, 3]])
    assert profiled == [257, 1, 33, 1]
    assert kernels == {"prefill": (0.0, 0.0), "attend": (2.0, 1.0), "gemm": (6.5, 2.0), "copy": (0.0, 0.0)}


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        main(["--out", str(tmp_path / "profile.json")])
