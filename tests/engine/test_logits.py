"""The model through vLLM's engine against transformers' in float32, with the same quantisation in both."""

import pytest
import torch

from engine.checkpoints import SHAPES, TOPK, checkpoint, prompts
from engine.comparison import BFLOAT16_KL, assert_close, mean_kl
from engine.harness import attention_layers, complete, engine
from engine.oracle import load_oracle

CONTEXTS = (TOPK - 1, TOPK, TOPK + 1, 4 * TOPK, 7)


@pytest.mark.parametrize(
    ("shape", "cache"), [*((shape, "auto") for shape in SHAPES), ("experts, YaRN", "fp8"), ("other widths", "fp8")]
)
def test_whole_prefill_and_decode(shape, cache):
    """Prompts around top-k in one batch, each decoded across the boundary or past it."""
    path = checkpoint(shape)
    with engine(path, kv_cache_dtype=cache) as llm:
        completions = complete(llm, prompts(*CONTEXTS), 8)
    assert_close(load_oracle(path, fp8_latent=cache == "fp8"), completions, cache)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_chunked_prefill_beside_decode(cache):
    """A budget of 48 tokens a step: prompts are cut, and chunks share steps with decoding requests."""
    path = checkpoint("experts, YaRN")
    with engine(path, kv_cache_dtype=cache, max_num_batched_tokens=48, max_num_seqs=4) as llm:
        completions = complete(llm, prompts(*CONTEXTS), 8)
    assert_close(load_oracle(path, fp8_latent=cache == "fp8"), completions, cache)


@pytest.mark.parametrize(("cache", "block_size"), [("auto", 16), ("auto", 64), ("auto", 128), ("fp8", 64)])
def test_prefix_cache_hit(cache, block_size):
    """The second round reads both caches' pages that the first one wrote."""
    if torch.cuda.is_available() and block_size % 64:
        pytest.skip("on a GPU pages hold a multiple of 64 tokens")
    path = checkpoint("experts, YaRN")
    with engine(path, kv_cache_dtype=cache, prefix_caching=True, block_size=block_size) as llm:
        shared = prompts(4 * TOPK)[0]
        complete(llm, [shared], 1, prompt_logits=False)
        followed = [shared + tail for tail in prompts(5, 40, 17, 33, seed=9)]
        completions = complete(llm, followed, 32, prompt_logits=False)
        assert {layer.kv_cache.shape[1] for layer in attention_layers(llm)} == {block_size}
    assert [c.num_cached_tokens for c in completions] == [4 * TOPK] * 4
    assert_close(load_oracle(path, fp8_latent=cache == "fp8"), completions, cache)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_bfloat16(cache):
    """The dtype that the model is deployed in."""
    path = checkpoint("bfloat16")
    with engine(path, dtype="bfloat16", kv_cache_dtype=cache) as llm:
        completions = complete(llm, prompts(*CONTEXTS), 8)
    divergence = mean_kl(load_oracle(path, fp8_latent=cache == "fp8"), completions)
    print(f"mean KL {divergence:.1e}")
    assert divergence <= BFLOAT16_KL
