"""Tensor and pipeline parallelism over two processes: the same greedy output as in one."""

import pytest
import torch

from engine.checkpoints import TOPK, checkpoint, prompts
from engine.harness import complete, engine

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")

ASKED = prompts(TOPK - 2, 3 * TOPK, 9)
SHARED = {"vllm_dsv32": {"shared_selection_from": 0}}
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with engine(checkpoint("experts, YaRN")) as llm:
        return [c.generated for c in complete(llm, ASKED, NUM_TOKENS, prompt_logits=False)]


def generated(**options) -> list[list[int]]:
    with engine(checkpoint("experts, YaRN"), **options) as llm:
        return [c.generated for c in complete(llm, ASKED, NUM_TOKENS, prompt_logits=False)]


def test_tensor_parallel(plain):
    assert generated(tensor_parallel_size=2) == plain


def test_ranks_that_share_the_selection(plain, monkeypatch, capfd):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # so that the workers read it
    assert generated(tensor_parallel_size=2, additional_config=SHARED) == plain
    assert "share the selection of long prefills: 2 ranks" in capfd.readouterr().out


def test_pipeline_parallel(plain, monkeypatch):
    # On the CPU vLLM allocates the buffers between stages in a warm-up that it leaves out for breakable graphs.
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    assert generated(pipeline_parallel_size=2, enforce_eager=False) == plain
