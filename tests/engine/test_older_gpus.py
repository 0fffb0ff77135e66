"""What GPUs without fp8 products and with less shared memory run, run here."""

import pytest
import torch

from engine.checkpoints import TOPK, checkpoint, prompts
from engine.comparison import BFLOAT16_KL, mean_kl
from engine.harness import complete, engine
from engine.oracle import load_oracle
from vllm_dsv32.kernels import triton_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WITHOUT_HOPPER = {"vllm_dsv32": {"kernels": {"sparse_mla": "triton"}}}
CONTEXTS = (TOPK - 1, TOPK + 1, 4 * TOPK, 7)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_the_path_of_another_gpu(monkeypatch, capability, cache):
    """As near to the oracle as this GPU's own path has to be, and the same tokens but for near ties."""
    path = checkpoint("bfloat16")
    with engine(path, dtype="bfloat16", kv_cache_dtype=cache) as llm:
        own = complete(llm, prompts(*CONTEXTS), 8)
    chosen = []
    monkeypatch.setattr(triton_device, "capability_of", lambda device: chosen.append(device) or capability)
    with engine(path, dtype="bfloat16", kv_cache_dtype=cache, additional_config=WITHOUT_HOPPER) as llm:
        other = complete(llm, prompts(*CONTEXTS), 8)
    assert chosen
    divergence = mean_kl(load_oracle(path, fp8_latent=cache == "fp8"), other)
    pairs = [(a, b) for x, y in zip(own, other, strict=True) for a, b in zip(x.generated, y.generated, strict=True)]
    same = sum(a == b for a, b in pairs) / len(pairs)
    print(f"mean KL {divergence:.1e}, {same:.0%} of the tokens as on this GPU's own path")
    assert divergence <= BFLOAT16_KL
    assert same >= 0.8
