import inspect
from dataclasses import replace

import pytest
import torch

from vllm_dsv32.errors import KernelUnavailableError
from vllm_dsv32.kernels.dispatch import KERNELS, OPERATIONS, Problem, explain, select_kernels

PROBLEM = Problem(
    device_type="cpu",
    capability=None,
    dtype=torch.bfloat16,
    cache_format="auto",
    num_heads=16,
    kv_lora_rank=512,
    rope_dim=64,
    num_index_heads=64,
    index_head_dim=128,
    topk=2048,
)
ON_A_GPU = replace(PROBLEM, device_type="cuda", capability=(9, 0))


def test_every_operation_has_a_reference_and_every_row_an_operation():
    assert {kernel.operation for kernel in KERNELS if kernel.name == "reference"} == set(OPERATIONS)
    assert {kernel.operation for kernel in KERNELS} == set(OPERATIONS)


def test_every_implementation_has_the_signature_of_its_reference():
    references = {row.operation: row.load() for row in KERNELS if row.name == "reference"}
    for row in KERNELS:
        wanted = inspect.signature(references[row.operation])
        assert inspect.signature(row.load()) == wanted, f"{row.operation} {row.name}"


def test_the_choice_is_recorded():
    kernels = select_kernels(PROBLEM)
    assert set(kernels.names) == set(OPERATIONS)
    for operation, name in kernels.names.items():
        chosen = next(row for row, refusal in explain(operation, PROBLEM) if refusal is None)
        assert chosen.name == name
        assert getattr(kernels, operation) is chosen.load()


def test_a_cpu_is_served_by_the_references():
    kernels = select_kernels(PROBLEM)
    assert set(kernels.names.values()) == {"reference"}
    assert not kernels.graph_capturable


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("cache_format", ["auto", "fp8_ds_mla"])
def test_a_gpu_can_be_served_without_a_reference(capability, cache_format):
    wanted = {operation: "torch" if operation == "mla_output" else "triton" for operation in OPERATIONS}
    kernels = select_kernels(replace(ON_A_GPU, capability=capability, cache_format=cache_format), wanted)
    assert kernels.names == wanted
    assert kernels.graph_capturable


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (PROBLEM, "takes CUDA devices, got cpu"),
        (replace(ON_A_GPU, capability=(7, 5)), "takes compute capability 8.0 or above, got 7.5"),
        (replace(ON_A_GPU, capability=None), "takes compute capability 8.0 or above, got unknown"),
        (replace(ON_A_GPU, dtype=torch.float16), "takes models in bfloat16 or float32, got torch.float16"),
        (replace(ON_A_GPU, rope_dim=32), "takes kv_lora_rank 512 and qk_rope_head_dim 64, got 512 and 32"),
        (replace(ON_A_GPU, cache_format="fp8_e5m2"), "takes the cache formats auto and fp8_ds_mla, got fp8_e5m2"),
    ],
)
@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation != "mla_output"])
def test_triton_says_what_it_does_not_take(operation, problem, words):
    refusals = {kernel.name: refusal for kernel, refusal in explain(operation, problem)}
    assert refusals["triton"] == words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_lora_rank": 256}, "takes kv_lora_rank 512 and qk_rope_head_dim 64, got 256 and 64"),
        ({"index_head_dim": 64}, "takes index_head_dim 128, got 64"),
        ({"cache_format": "fp8_e5m2"}, "takes the cache formats auto and fp8_ds_mla, got fp8_e5m2"),
    ],
)
def test_a_problem_that_nobody_takes_lists_each_reason(change, words):
    with pytest.raises(KernelUnavailableError, match=words):
        select_kernels(replace(PROBLEM, **change))


def test_an_override_is_obeyed_or_refused():
    assert select_kernels(PROBLEM, {"sparse_mla": "reference"}).names["sparse_mla"] == "reference"
    with pytest.raises(KernelUnavailableError, match="no implementation of sparse_mla called warp"):
        select_kernels(PROBLEM, {"sparse_mla": "warp"})
    with pytest.raises(
        KernelUnavailableError, match=r"sparse_mla called triton takes .*triton: takes CUDA devices"
    ):
        select_kernels(PROBLEM, {"sparse_mla": "triton"})
    assert select_kernels(ON_A_GPU, {"sparse_mla": "reference"}).names["sparse_mla"] == "reference"
    with pytest.raises(KernelUnavailableError, match="no operation is called attention; the operations are"):
        select_kernels(PROBLEM, {"attention": "reference"})
