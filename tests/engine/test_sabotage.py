"""The comparison of test_logits.py fails for each mistake that implementations of this model have made."""

import pytest
import torch

from engine.checkpoints import TOPK, checkpoint, prompts
from engine.comparison import BFLOAT16_KL, ROW_TOLERANCE, assert_close, mean_kl, row_errors
from engine.faults import (
    index_rope_interleaved,
    k_norm_without_bias,
    latent_scale_per_row,
    mla_rope_as_halves,
    relu_after_the_sum,
    topk_off_by_one,
)
from engine.harness import complete, engine, kernels_replaced
from engine.oracle import load_oracle

SABOTAGES = {
    "auto": [index_rope_interleaved, mla_rope_as_halves, relu_after_the_sum, k_norm_without_bias, topk_off_by_one],
    "fp8": [index_rope_interleaved, latent_scale_per_row],
}

# What it shows of the comparison holds wherever the comparison is made.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the damaged kernels are written for the CPU")


@pytest.mark.parametrize("cache", SABOTAGES)
def test_each_sabotage_is_seen(cache):
    path = checkpoint("experts, YaRN")
    oracle = load_oracle(path, fp8_latent=cache == "fp8")
    unseen = []
    with engine(path, kv_cache_dtype=cache, enforce_eager=True) as llm:
        assert_close(oracle, complete(llm, prompts(4 * TOPK), 8), cache)
        for sabotage in SABOTAGES[cache]:
            with kernels_replaced(llm, **sabotage()):
                completions = complete(llm, prompts(4 * TOPK), 8)
            share = (row_errors(oracle, completions) <= ROW_TOLERANCE[cache]).double().mean().item()
            print(f"{sabotage.__name__}: within {share:.3f}")
            try:
                assert_close(oracle, completions, cache)
            except AssertionError:
                continue
            unseen.append(sabotage.__name__)
    assert not unseen


def test_sabotages_are_seen_in_bfloat16():
    """One of the selection, one of attention; the subtlest need float32's resolution."""
    path = checkpoint("bfloat16")
    oracle = load_oracle(path)
    with engine(path, dtype="bfloat16", enforce_eager=True) as llm:
        for sabotage in (k_norm_without_bias, mla_rope_as_halves):
            with kernels_replaced(llm, **sabotage()):
                divergence = mean_kl(oracle, complete(llm, prompts(4 * TOPK), 8))
            print(f"{sabotage.__name__}: mean KL {divergence:.1e}")
            assert divergence > BFLOAT16_KL, sabotage.__name__
