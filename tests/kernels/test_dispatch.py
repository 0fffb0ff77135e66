import ast
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_dsv32.errors import KernelUnavailableError
from vllm_dsv32.kernels import cuda_library, dispatch, sparse_mla_cuda_union
from vllm_dsv32.kernels.dispatch import KERNELS, OPERATIONS, Problem, explain, select_kernels
from vllm_dsv32.kernels.vendor.libraries import is_installed

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


def signature(row):
    """As it is written, because some modules import only where vLLM's libraries are."""
    module, _, function = row.target.partition(":")
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    (node,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"


def test_every_implementation_has_the_signature_of_its_reference():
    references = {row.operation: signature(row) for row in KERNELS if row.name == "reference"}
    for row in KERNELS:
        assert signature(row) == references[row.operation], f"{row.operation} {row.name}"


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


def test_triton_selects_no_more_than_it_can_hold():
    """The table says what the kernel says."""
    (row,) = (row for row in KERNELS if (row.operation, row.name) == ("topk_select", "triton"))
    wanted = "a top-k of at most 2048, got 2049"
    assert row.refuse(replace(ON_A_GPU, topk=2049)) == f"takes {wanted}"
    assert row.refuse(ON_A_GPU) is None
    one = torch.zeros(1, 1).int()
    with pytest.raises(ValueError, match=wanted):
        row.load()(one.float(), one[0], one[0], one, 16, one.new_zeros(1, 2049))


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


CUDA = {
    "index_logits": replace(ON_A_GPU, num_index_heads=64),
    "topk_select": ON_A_GPU,
    "sparse_mla": replace(ON_A_GPU, cache_format="fp8_ds_mla", num_heads=8),
}


@pytest.mark.parametrize(
    ("num_heads", "name"),
    [(15, "gluon"), (16, "union"), (17, "gluon"), (32, "gluon"), (33, "cuda"), (64, "cuda"), (128, "cuda")],
)
def test_which_kernel_reads_a_bfloat16_cache_where_all_were_built(monkeypatch, num_heads, name):
    monkeypatch.setattr(cuda_library, "refusal", lambda: None)
    problem = replace(ON_A_GPU, num_heads=num_heads)
    assert select_kernels(problem).names["sparse_mla"] == name


@pytest.mark.parametrize("operation", CUDA)
@pytest.mark.parametrize("reason", [None, "needs the library"])
def test_cuda_kernels_come_first_where_they_were_built(monkeypatch, operation, reason):
    monkeypatch.setattr(cuda_library, "refusal", lambda: reason)
    chosen = select_kernels(CUDA[operation]).names[operation]
    assert (chosen == "cuda") == (reason is None)
    refusals = {row.name: refusal for row, refusal in explain(operation, CUDA[operation])}
    assert refusals["cuda"] == reason


@pytest.mark.parametrize(
    ("operation", "change", "words"),
    [
        ("index_logits", {"capability": (10, 0)}, "takes compute capability 9.0, got 10.0"),
        ("index_logits", {"num_index_heads": 32}, "takes 64 index heads, got 32"),
        ("index_logits", {"dtype": torch.float16}, "takes models in bfloat16 or float32, got torch.float16"),
        ("topk_select", {"device_type": "cpu"}, "takes CUDA devices, got cpu"),
        ("topk_select", {"capability": (10, 0)}, "takes compute capability 9.0, got 10.0"),
        ("topk_select", {"topk": 2049}, "takes a top-k of at most 2048, got 2049"),
        ("sparse_mla", {"capability": (8, 0)}, "takes compute capability 9.0, got 8.0"),
        ("sparse_mla", {"cache_format": "fp8_e5m2"}, "takes the cache formats auto and fp8_ds_mla, got fp8_e5m2"),
        (
            "sparse_mla",
            {"cache_format": "auto", "num_heads": 32},
            "takes 33 heads and more with the cache format auto, got 32",
        ),
        ("sparse_mla", {"dtype": torch.float32}, "takes models in bfloat16, got torch.float32"),
    ],
)
def test_cuda_kernels_say_what_they_do_not_take(monkeypatch, operation, change, words):
    monkeypatch.setattr(cuda_library, "refusal", lambda: None)
    refusals = {row.name: refusal for row, refusal in explain(operation, replace(CUDA[operation], **change))}
    assert refusals["cuda"] == words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"num_heads": 8}, "takes 16 heads, got 8"),
        ({"topk": 2049}, "takes a top-k of at most 2048, got 2049"),
        ({"dtype": torch.float32}, "takes models in bfloat16, got torch.float32"),
        ({"cache_format": "fp8_ds_mla"}, None),
        ({"cache_format": "fp8"}, "takes the cache formats auto and fp8_ds_mla, got fp8"),
        ({"capability": (10, 0)}, "takes compute capability 9.0, got 10.0"),
    ],
)
def test_unions_come_first_where_they_were_built(monkeypatch, change, words):
    monkeypatch.setattr(cuda_library, "refusal", lambda: None)
    problem = replace(ON_A_GPU, **change)
    assert next(refusal for row, refusal in explain("sparse_mla", problem) if row.name == "union") == words
    if words is None:
        chosen = select_kernels(problem)
        assert chosen.names["sparse_mla"] == "union"
        assert chosen.graph_capturable
        assert chosen.scratch_nbytes["sparse_mla"] == sparse_mla_cuda_union.SCRATCH_NBYTES
        assert select_kernels(problem, {"sparse_mla": "gluon"}).scratch_nbytes["sparse_mla"] == 0


# Operation, name, a problem that the row takes where vLLM's libraries are, and the library that it needs.
FP8_ON_A_GPU = replace(ON_A_GPU, cache_format="fp8_ds_mla")
VENDOR = {
    "deep_gemm": ("index_logits", ON_A_GPU, "vllm.third_party.deep_gemm or deep_gemm"),
    "vllm": ("topk_select", ON_A_GPU, "vllm._C_stable_libtorch"),
    "flash_mla": ("sparse_mla", FP8_ON_A_GPU, "vllm._flashmla_C"),
    "flash_attn3": ("sparse_mla", ON_A_GPU, "vllm.vllm_flash_attn._vllm_fa3_C"),
}


def refusal_by(name, problem):
    operation = VENDOR[name][0]
    return next(refusal for row, refusal in explain(operation, problem) if row.name == name)


def test_rows_by_name_only_come_last():
    assert {row.name for row in KERNELS if row.by_name_only} == set(VENDOR)
    assert [row.by_name_only for row in KERNELS] == sorted(row.by_name_only for row in KERNELS)


@pytest.mark.parametrize("name", VENDOR)
def test_a_vendor_row_is_chosen_by_name_and_never_otherwise(monkeypatch, name):
    operation, problem, _ = VENDOR[name]
    monkeypatch.setattr(dispatch, "is_installed", lambda module: True)
    assert refusal_by(name, problem) is None
    monkeypatch.setattr(dispatch, "KERNELS", [row for row in KERNELS if row.by_name_only])
    with pytest.raises(KernelUnavailableError, match=f"{name}: would take it"):
        dispatch._choose(operation, problem, None)
    assert dispatch._choose(operation, problem, name).name == name


@pytest.mark.parametrize("name", VENDOR)
def test_a_vendor_row_names_the_library_that_it_lacks(monkeypatch, name):
    operation, problem, library = VENDOR[name]
    monkeypatch.setattr(dispatch, "is_installed", lambda module: False)
    wanted = f"needs {library}, which is not installed; vLLM's wheel for CUDA has it"
    assert refusal_by(name, problem) == wanted
    with pytest.raises(KernelUnavailableError, match=f"{name}: {wanted}"):
        select_kernels(problem, {operation: name})


HOPPER_ONLY = [name for name in VENDOR if name != "vllm"]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        *((name, {"capability": (8, 9)}, "takes compute capability 9.0, got 8.9") for name in HOPPER_ONLY),
        *((name, {"capability": (10, 0)}, "takes compute capability 9.0, got 10.0") for name in HOPPER_ONLY),
        *((name, {"capability": None}, "takes compute capability 9.0, got unknown") for name in HOPPER_ONLY),
        *((name, {"device_type": "cpu", "capability": None}, "takes CUDA devices, got cpu") for name in VENDOR),
        *((name, {"kv_lora_rank": 256}, "takes kv_lora_rank 512 and .*, got 256 and 64") for name in VENDOR),
        ("deep_gemm", {"num_index_heads": 16}, "takes 32 or 64 index heads, got 16"),
        ("vllm", {"topk": 256}, "takes a top-k of 512, 1024 or 2048, got 256"),
        ("flash_mla", {"cache_format": "auto"}, "takes the cache format fp8_ds_mla, got auto"),
        ("flash_mla", {"dtype": torch.float32}, "takes models in bfloat16, got torch.float32"),
        ("flash_mla", {"num_heads": 256}, "takes at most 128 heads, got 256"),
        ("flash_mla", {"topk": 100}, "takes a top-k that is a multiple of 64, got 100"),
        ("flash_attn3", {"cache_format": "fp8_ds_mla"}, "takes the cache format auto .*, got fp8_ds_mla in"),
        ("flash_attn3", {"dtype": torch.float32}, "takes the cache format auto .*, got auto in torch.float32"),
    ],
)
def test_vendor_rows_say_what_they_do_not_take(monkeypatch, name, change, words):
    monkeypatch.setattr(dispatch, "is_installed", lambda module: True)
    refusal = refusal_by(name, replace(VENDOR[name][1], **change))
    assert refusal is not None
    assert re.fullmatch(f"{words}.*", refusal)


def test_libraries_are_found_without_being_imported():
    """In a process of its own: here vLLM may have been imported already."""
    code = (
        "import sys; from vllm_dsv32.kernels.vendor.libraries import is_installed as found;"
        "print(found('xml.etree'), found('xml.etree.ElementTree'), found('xml.nothing'), found('vllm.no.such'),"
        "found('no.such'), 'xml' in sys.modules, 'vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "False", "False", "False", "False"]
    assert is_installed("torch")
