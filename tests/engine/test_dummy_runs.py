"""Steps without a batch, as profiling and idle data-parallel ranks make them, leave no trace."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoints import TOPK, checkpoint, prompts
from engine.harness import attention_layers, complete, engine


def test_a_dummy_batch_changes_nothing():
    with engine(checkpoint("experts, YaRN"), kv_cache_dtype="fp8", prefix_caching=True) as llm:
        asked = prompts(3 * TOPK)
        first = complete(llm, asked, 8, prompt_logits=False)
        caches = [layer.kv_cache.clone() for layer in attention_layers(llm)]
        llm.engine_core.engine_core.execute_dummy_batch()
        for layer, before in zip(attention_layers(llm), caches, strict=True):
            assert torch.equal(layer.kv_cache, before)
        second = complete(llm, asked, 8, prompt_logits=False)
    assert second[0].num_cached_tokens > 0
    assert second[0].generated == first[0].generated


def test_without_a_batch_the_output_is_zero():
    """Ranks without work must agree on what their experts see; memory that nobody wrote would not."""
    outputs = []

    def poison(_layer, arguments):
        arguments[-1].fill_(torch.nan)

    def keep(_layer, arguments, _result):
        outputs.append(arguments[-1].clone())

    with engine(checkpoint("experts, YaRN"), enforce_eager=True) as llm:
        for layer in attention_layers(llm):
            layer.register_forward_pre_hook(poison)
            layer.register_forward_hook(keep)
        llm.engine_core.engine_core.execute_dummy_batch()
    assert outputs
    assert all(bool((output == 0).all()) for output in outputs)


class Allocations(TorchDispatchMode):
    """The bytes of each tensor that is made of another one, without a value."""

    def __init__(self):
        super().__init__()
        self.nbytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.new_empty.default:
            self.nbytes.append(result.nbytes)
        return result


def test_while_vllm_measures_memory_is_taken_as_with_a_batch():
    """So that what vLLM finds to be left is left."""
    batches = []
    with engine(checkpoint("experts, YaRN"), enforce_eager=True) as llm:
        layers = attention_layers(llm)
        layers[0].register_forward_pre_hook(lambda _layer, arguments: batches.append(len(arguments[0])))
        with Allocations() as allocations:
            llm.collective_rpc(lambda worker: worker.model_runner.profile_run())
    (num_tokens,) = batches
    queries_and_results = num_tokens * 4 * layers[0].num_heads * (512 + 64 + 512)
    index_queries, logits = num_tokens * layers[0].dims.num_index_heads * (128 + 4), num_tokens * 4 * 512
    scratch = layers[0].kernels.scratch_nbytes
    taken = [queries_and_results, index_queries, max(logits + scratch["topk_select"], scratch["sparse_mla"])]
    made = allocations.nbytes
    assert sum(made[i : i + 3] == taken for i in range(len(made))) == len(layers)
