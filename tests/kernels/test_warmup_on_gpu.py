"""After the warm-up, batches of a server compile nothing."""

from dataclasses import replace

import pytest
import torch
import triton

from kernels.inputs import PROBLEM, loading
from vllm_dsv32.kernels.dispatch import KernelSet, Problem, select_kernels
from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.kernels.warmup import _attend, _select, warm_up
from vllm_dsv32.layout import FP8_DS_MLA, INDEX_KEY_NBYTES, LATENT_FP8_NBYTES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BLOCK_SIZE = 128
MAX_NUM_KEYS = 70_000
MAX_NUM_TOKENS = 8192
MAX_NUM_REQUESTS = 64

# Requests, tokens and the longest context of a step.
STEPS = {
    "decode": [(n, n, width) for n in (1, 3, 17, 64) for width in (300, 5000, 40_000, MAX_NUM_KEYS)],
    "speculative decode": [(n, k * n, 40_000) for n in (1, 5, 16) for k in (2, 3, 4)],
    "prefill": [
        *((1, 8192, width) for width in (8192, 16_384, 65_536)),
        *((1, n, width) for n in (100, 200, 400, 700) for width in (3000, 40_000)),
        (3, 2000, 9000),
    ],
}


def prepare(kernels: KernelSet, problem: Problem, num_tokens: int) -> None:
    """As layers of the model call the operation: on parts of what their fused projections give."""

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    _, kv_c, k_pe = zeros(num_tokens, 1536 + 512 + 64).split([1536, 512, 64], dim=-1)
    index_k, head_weights = zeros(num_tokens, 128 + 64, dtype=torch.float32).split([128, 64], dim=-1)
    slots = torch.arange(num_tokens, device="cuda")
    num_blocks = num_tokens // BLOCK_SIZE + 1
    fp8 = problem.cache_format == FP8_DS_MLA
    row, dtype = (LATENT_FP8_NBYTES, torch.uint8) if fp8 else (512 + 64, torch.bfloat16)
    kernels.keys_and_queries(
        slots,
        zeros(num_tokens, 64, dtype=torch.float32),
        RopeLayout.NEOX,
        Latents(kv_c, k_pe, zeros(512), 1e-6, slots, zeros(num_blocks, BLOCK_SIZE, row, dtype=dtype)),
        IndexKeys(
            index_k,
            zeros(128, dtype=torch.float32),
            zeros(128, dtype=torch.float32),
            1e-6,
            slots,
            zeros(num_blocks, BLOCK_SIZE, INDEX_KEY_NBYTES, dtype=torch.uint8),
        ),
        IndexQueries(zeros(num_tokens, 64, 128), head_weights),
        MlaQueries(zeros(num_tokens, problem.num_heads, 192), zeros(problem.num_heads, 128, 512)),
    )


@pytest.mark.parametrize(("cache_format", "num_heads"), [("auto", 16), ("fp8_ds_mla", 16), ("auto", 128)])
def test_nothing_is_compiled_while_serving(monkeypatch, cache_format, num_heads):
    problem = replace(
        PROBLEM,
        capability=torch.cuda.get_device_capability(),
        cache_format=cache_format,
        num_heads=num_heads,
        num_index_heads=64,
        topk=2048,
    )
    with loading(torch.bfloat16):
        warm_up.__wrapped__(
            problem, (), BLOCK_SIZE, MAX_NUM_KEYS, MAX_NUM_TOKENS, MAX_NUM_REQUESTS, 128, RopeLayout.NEOX
        )
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"])
    )
    kernels = select_kernels(problem)
    late = {}
    for name, steps in STEPS.items():
        for step in steps:
            compiled.clear()
            prepare(kernels, problem, step[1])
            _select(kernels, problem, BLOCK_SIZE, *step)
            _attend(kernels, problem, BLOCK_SIZE, [step[1]])
            if compiled:
                late[name, step] = list(compiled)
    assert not late
