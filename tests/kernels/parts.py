"""The parts of ``keys_and_queries``, each tested as if alone: the others have something of their own to do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kernels.inputs import implementations, index_cache, latent_cache
from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.rope import RopeLayout

EPS = 1e-6
BLOCK_SIZE = 16


def implementations_of_part(kind: type):
    """A parameter set: the implementations of ``keys_and_queries`` with the signature of a part's reference."""
    return implementations("keys_and_queries", adapt=lambda kernel: partial(_part, kind, kernel))


def _part(
    kind: type,
    kernel: Callable[..., Any],
    part: tuple,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    index_rope_layout: RopeLayout = RopeLayout.NEOX,
) -> Any:
    assert isinstance(part, kind)
    parts = [part if isinstance(other, kind) else other for other in _other_parts(len(positions))]
    mla_q, q_fp8, weights = kernel(positions, cos_sin_cache, index_rope_layout, *parts)
    return {MlaQueries: mla_q, IndexQueries: (q_fp8, weights)}.get(kind)


def _other_parts(num_tokens: int) -> tuple[Latents, IndexKeys, IndexQueries, MlaQueries]:
    slots = torch.arange(num_tokens)
    num_blocks = num_tokens // BLOCK_SIZE + 1
    return (
        Latents(
            torch.ones(num_tokens, 512, dtype=torch.bfloat16),
            torch.ones(num_tokens, 64, dtype=torch.bfloat16),
            torch.ones(512, dtype=torch.bfloat16),
            EPS,
            slots,
            latent_cache(num_blocks, BLOCK_SIZE, "bfloat16"),
        ),
        IndexKeys(
            torch.ones(num_tokens, 128, dtype=torch.bfloat16),
            torch.ones(128),
            torch.ones(128),
            EPS,
            slots,
            index_cache(num_blocks, BLOCK_SIZE),
        ),
        IndexQueries(torch.ones(num_tokens, 3, 128, dtype=torch.bfloat16), torch.ones(num_tokens, 3)),
        MlaQueries(torch.ones(num_tokens, 2, 192, dtype=torch.bfloat16), torch.ones(2, 128, 512).bfloat16()),
    )
