"""After the warm-up, batches of a server compile nothing."""

from dataclasses import replace

import pytest
import torch
import triton

from kernels.inputs import PROBLEM, loading
from vllm_dsv32.kernels.dispatch import select_kernels
from vllm_dsv32.kernels.warmup import _attend, _select, warm_up

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


@pytest.mark.parametrize("cache_format", ["auto", "fp8_ds_mla"])
def test_nothing_is_compiled_while_serving(monkeypatch, cache_format):
    problem = replace(
        PROBLEM,
        capability=torch.cuda.get_device_capability(),
        cache_format=cache_format,
        num_heads=16,
        num_index_heads=64,
        topk=2048,
    )
    with loading(torch.bfloat16):
        warm_up.__wrapped__(problem, (), BLOCK_SIZE, MAX_NUM_KEYS, MAX_NUM_TOKENS, MAX_NUM_REQUESTS)
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"])
    )
    kernels = select_kernels(problem)
    late = {}
    for name, steps in STEPS.items():
        for step in steps:
            compiled.clear()
            _select(kernels, problem, BLOCK_SIZE, *step)
            _attend(kernels, problem, BLOCK_SIZE, [step[1]])
            if compiled:
                late[name, step] = list(compiled)
    assert not late
