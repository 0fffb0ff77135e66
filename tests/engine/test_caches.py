"""fp8_ds_mla against a cache in the model's dtype: the difference is that of the quantisation."""

import pytest
import torch

from engine.checkpoints import TOPK, checkpoint, prompts
from engine.comparison import kl_divergence
from engine.faults import places
from engine.harness import complete, engine, kernels_replaced

# Between what quantising the latent does (6e-5 here) and what a damaged cache does (0.5 and more).
MARK = 3e-4


def run(llm) -> torch.Tensor:
    return torch.cat([c.logits() for c in complete(llm, prompts(3 * TOPK, 20), 1)])


def one_byte_shifted(original):
    """Rows that begin a byte late, as a wrong offset of the scales would make them."""

    def sabotaged(positions, table, layout, latents, *others):
        queries = original(positions, table, layout, latents, *others)
        at = places(latents)
        latents.cache[at] = latents.cache[at].roll(1, dims=-1)
        return queries

    return sabotaged


def scales_forgotten(original):
    def sabotaged(positions, table, layout, latents, *others):
        queries = original(positions, table, layout, latents, *others)
        latents.cache[(*places(latents), slice(512, 528))] = torch.ones(4).view(torch.uint8)
        return queries

    return sabotaged


def not_written(original):
    def sabotaged(positions, table, layout, latents, *others):
        nowhere = latents._replace(slots=torch.full_like(latents.slots, -1))
        return original(positions, table, layout, nowhere, *others)

    return sabotaged


def plain_logits(path) -> torch.Tensor:
    with engine(path, kv_cache_dtype="auto") as llm:
        return run(llm)


def test_the_caches_differ_by_quantisation_only():
    path = checkpoint("dense, no YaRN")
    plain = plain_logits(path)
    with engine(path, kv_cache_dtype="fp8") as llm:
        assert llm.vllm_config.cache_config.cache_dtype == "fp8_ds_mla"
        divergence = kl_divergence(plain, run(llm)).mean().item()
    print(f"fp8_ds_mla: mean KL {divergence:.1e}")
    assert 0 < divergence <= MARK


@pytest.mark.skipif(torch.cuda.is_available(), reason="a damaged cache ended in a device-side assertion of vLLM's")
def test_a_damaged_cache_is_seen():
    path = checkpoint("dense, no YaRN")
    plain = plain_logits(path)
    with engine(path, kv_cache_dtype="fp8", enforce_eager=True) as llm:
        for damage in (one_byte_shifted, scales_forgotten, not_written):
            with kernels_replaced(llm, keys_and_queries=damage):
                damaged = kl_divergence(plain, run(llm).nan_to_num()).mean().item()
            print(f"{damage.__name__}: mean KL {damaged:.1e}")
            assert damaged > 10 * MARK, damage.__name__
