"""What DeepSeek-V3.2 needs of each GPU's memory, and how many tokens the caches hold in what is left.

    python recipes/memory.py --gpu-gib 139 --tensor-parallel-size 8

Weights are counted tensor by tensor as this plugin and vLLM place them: experts are split over all ranks of a
stage, heads and dense MLPs over tensor-parallel ranks; the indexer and the down-projections of attention are whole.
Every rank has the caches of its stage's layers whole: neither can be split by heads. Activations, graphs and
communication buffers are not counted but assumed (--overhead-gib), but for what grows with data parallelism: the
experts of a rank take the tokens of all replicas at once. vLLM measures all that and logs the outcome.
The exit status is 0 if the model fits, 1 if it does not.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.distributed.utils import get_pp_indices

from vllm_dsv32.checkpoint_tensors import TensorSpec, checkpoint_tensors
from vllm_dsv32.layout import INDEX_KEY_NBYTES, KV_LORA_RANK, LATENT_FP8_NBYTES, ROPE_DIM

GIB = 2**30
PUBLISHED = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": KV_LORA_RANK,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": ROPE_DIM,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
}
"""The sizes of deepseek-ai/DeepSeek-V3.2."""

BF16_BITS, FP32_BITS = 16.0, 32.0
FP8_BLOCK_BITS = 8 + FP32_BITS / 128**2
"""fp8 with a float32 scale for each block of 128 x 128."""


@dataclass(frozen=True)
class Deployment:
    """How the model is spread, and how its weights are stored."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    draft: bool = False
    """Whether the multi-token-prediction layer is loaded."""
    expert_bits: float = FP8_BLOCK_BITS
    """Of a routed expert's weight, scales included."""
    linear_bits: float = FP8_BLOCK_BITS
    """Of every other weight that the published checkpoint holds in fp8."""
    num_batched_tokens: int = 8192
    """Of a replica's step, at most."""

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass(frozen=True)
class Stage:
    """One GPU of a pipeline stage."""

    weight_nbytes: float
    num_cached_layers: int

    def num_tokens(self, cache_nbytes: float, layer_nbytes: int) -> int:
        return int(max(0.0, cache_nbytes) // (layer_nbytes * self.num_cached_layers))


def latent_nbytes(cache_format: str) -> int:
    """Of one token in one layer."""
    return LATENT_FP8_NBYTES if cache_format == "fp8" else 2 * (KV_LORA_RANK + ROPE_DIM)


def stages(deployment: Deployment, sizes: Mapping[str, int] = PUBLISHED) -> list[Stage]:
    """What a GPU of each pipeline stage holds."""
    num_layers, num_stages = sizes["num_hidden_layers"], deployment.pipeline_parallel
    nbytes = [0.0] * num_stages
    cached = [0] * num_stages
    bounds = [get_pp_indices(num_layers, stage, num_stages) for stage in range(num_stages)]
    for spec in checkpoint_tensors(sizes):
        layer = _layer_index(spec)
        if layer is not None and layer >= num_layers and not _is_drafts_own(spec, deployment):
            continue
        stage = _stage_of(spec, layer, bounds)
        nbytes[stage] += _rank_nbytes(spec, deployment)
    for stage, (begin, end) in enumerate(bounds):
        cached[stage] = end - begin
    if deployment.draft:
        cached[-1] += sizes["num_nextn_predict_layers"]
    return [Stage(weights, layers) for weights, layers in zip(nbytes, cached, strict=True)]


def _is_drafts_own(spec: TensorSpec, deployment: Deployment) -> bool:
    """Whether a draft layer's tensor takes memory: vLLM lets go of its head, and where it can its embedding."""
    has_models = spec.role == "lm_head" or (spec.role == "embedding" and deployment.pipeline_parallel == 1)
    return deployment.draft and not has_models


def _layer_index(spec: TensorSpec) -> int | None:
    parts = spec.name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def _stage_of(spec: TensorSpec, layer: int | None, bounds: Sequence[tuple[int, int]]) -> int:
    if layer is None:
        return 0 if spec.role == "embedding" else len(bounds) - 1
    return next((stage for stage, (_, end) in enumerate(bounds) if layer < end), len(bounds) - 1)


def _rank_nbytes(spec: TensorSpec, deployment: Deployment) -> float:
    """The bytes of a tensor on one GPU of its stage."""
    bits, parts = BF16_BITS, 1
    if ".experts." in spec.name:
        bits, parts = deployment.expert_bits, deployment.tensor_parallel * deployment.data_parallel
    elif spec.is_fp8:
        bits = deployment.linear_bits
    elif spec.is_fp32:
        bits = FP32_BITS
    heads = spec.name.endswith(("q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight"))
    if heads or (spec.role in ("mlp", "embedding", "lm_head") and ".experts." not in spec.name):
        parts = deployment.tensor_parallel
    if spec.name.endswith("kv_b_proj.weight"):
        bits += BF16_BITS  # the absorbed halves, which are kept besides
    if spec.name.endswith((".wk.weight", ".weights_proj.weight")):
        bits += BF16_BITS  # both in one, likewise
    return math.prod(spec.shape) * bits / 8 / parts


def exchanged_nbytes(deployment: Deployment, sizes: Mapping[str, int] = PUBLISHED) -> int:
    """Of the tokens that other replicas send to a rank's experts.

    vLLM 0.32 takes all of them at once: a bfloat16 row for each expert of a token in either of two workspaces, and
    one as it comes and one as it goes (``vllm/model_executor/layers/fused_moe``: ``modular_kernel.py``,
    ``experts/triton_moe.py``).
    """
    num_tokens = (deployment.data_parallel - 1) * deployment.num_batched_tokens
    num_rows = 2 * sizes["num_experts_per_tok"] + 2
    return num_tokens * num_rows * sizes["hidden_size"] * 2


def report(deployment: Deployment, gpu_gib: float, utilization: float, overhead_gib: float) -> tuple[str, bool]:
    """The answer, a fact a line, and whether the model fits."""
    held = stages(deployment)
    context = PUBLISHED["max_position_embeddings"]
    weights = max(stage.weight_nbytes for stage in held)
    exchanged = exchanged_nbytes(deployment)
    left = [(gpu_gib * utilization - overhead_gib) * GIB - exchanged - stage.weight_nbytes for stage in held]
    lines = [
        f"{deployment.num_gpus} GPUs of {gpu_gib:g} GiB, of which vLLM takes {utilization:g}; "
        f"{overhead_gib:g} GiB of that assumed for neither weights nor caches",
        f"weights  {weights / GIB:6.1f} GiB a GPU",
        *([f"experts  {exchanged / GIB:6.1f} GiB a GPU, for tokens of other replicas"] if exchanged else []),
        f"caches   {min(left) / GIB:6.1f} GiB a GPU",
    ]
    for cache_format in ("bf16", "fp8"):
        layer = latent_nbytes(cache_format) + INDEX_KEY_NBYTES
        tokens = min(stage.num_tokens(nbytes, layer) for stage, nbytes in zip(held, left, strict=True))
        per_token = layer * max(stage.num_cached_layers for stage in held)
        lines.append(
            f"{cache_format:<5} {per_token:>8,} B a token: {tokens // 1000:>6,} thousand tokens"
            f"{_replicas(deployment)}, {tokens / context:.1f} requests of {context:,} tokens"
        )
    fits = min(left) > 0
    if not fits:
        lines.append("Does not fit.")
    return "\n".join(lines), fits


def _replicas(deployment: Deployment) -> str:
    return f" in each of {deployment.data_parallel} replicas" if deployment.data_parallel > 1 else ""


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {count}")
    return count


def _tensor_parallel_size(text: str) -> int:
    size, num_heads = _count(text), PUBLISHED["num_attention_heads"]
    if num_heads % size:
        raise argparse.ArgumentTypeError(f"expected a divisor of the model's {num_heads} heads, got {size}")
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answer; 0 if the model fits, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-gib", type=float, required=True, help="memory of a GPU, as torch reports it")
    parser.add_argument("--tensor-parallel-size", type=_tensor_parallel_size, default=1)
    parser.add_argument("--pipeline-parallel-size", type=_count, default=1)
    parser.add_argument("--data-parallel-size", type=_count, default=1)
    parser.add_argument(
        "--max-num-batched-tokens", type=_count, default=8192, help="of a replica's step; default: vLLM's, 8192"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92, help="default: vLLM's, 0.92")
    parser.add_argument("--overhead-gib", type=float, default=6.0, help="neither weights nor caches; default 6")
    parser.add_argument("--draft", action="store_true", help="load the multi-token-prediction layer")
    parser.add_argument("--expert-bits", type=float, default=FP8_BLOCK_BITS, help="of a routed expert's weight")
    parser.add_argument("--linear-bits", type=float, default=FP8_BLOCK_BITS, help="of the other quantised weights")
    options = parser.parse_args(arguments)
    deployment = Deployment(
        tensor_parallel=options.tensor_parallel_size,
        pipeline_parallel=options.pipeline_parallel_size,
        data_parallel=options.data_parallel_size,
        draft=options.draft,
        expert_bits=options.expert_bits,
        linear_bits=options.linear_bits,
        num_batched_tokens=options.max_num_batched_tokens,
    )
    text, fits = report(deployment, options.gpu_gib, options.gpu_memory_utilization, options.overhead_gib)
    print(text)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
