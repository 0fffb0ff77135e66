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
    with pytest.raises(KernelUnavailableError, match="no operation is called attention; the operations are"):
        select_kernels(PROBLEM, {"attention": "reference"})
