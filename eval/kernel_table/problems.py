"""Random inputs of the timed operations, in the layouts of the caches, which the peers share."""

from dataclasses import dataclass

import torch

from vllm_dsv32.layout import FP8_DS_MLA, INDEX_KEY_NBYTES, LATENT_FP8_NBYTES, index_key_views, latent_fp8_views

__all__ = ["BLOCK_SIZE", "TOPK", "IndexProblem", "SparseProblem", "index_keys", "index_problem", "latent_caches"]

BLOCK_SIZE = 64
TOPK = 2048
LATENT_DIM = 576
NUM_INDEX_HEADS = 64
INDEX_DIM = 128


@dataclass(frozen=True)
class SparseProblem:
    """Attention of each token over its selected rows."""

    q: torch.Tensor
    """bfloat16 ``[T, N, 576]``."""
    slots: torch.Tensor
    """int32 ``[T, 2048]``, all valid, ascending, as ``topk_select`` writes positions."""
    num_valid: torch.Tensor
    """int32 ``[T]``."""

    @classmethod
    def random(cls, num_tokens: int, num_heads: int, num_slots: int, overlap: float = 0.0) -> "SparseProblem":
        """Rows drawn at random from a cache; each token has such a share of them from the one before."""
        num_others = round((1 - overlap) * TOPK)
        drawn = torch.randint(num_slots, ((num_tokens - 1) * num_others + TOPK,), device="cuda", dtype=torch.int32)
        slots = drawn.unfold(0, TOPK, num_others).sort(-1).values
        return cls(
            q=torch.randn(num_tokens, num_heads, LATENT_DIM, device="cuda", dtype=torch.bfloat16),
            slots=slots,
            num_valid=torch.full((num_tokens,), TOPK, device="cuda", dtype=torch.int32),
        )


@dataclass(frozen=True)
class IndexProblem:
    """Scoring of keys and selection of the highest."""

    q_fp8: torch.Tensor
    """float8_e4m3fn ``[T, 64, 128]``."""
    weights: torch.Tensor
    """float32 ``[T, 64]``."""
    block_table: torch.Tensor
    """int32 ``[R, L / 64]``: pages of the index keys, and of the latents that are selected."""
    request_ids: torch.Tensor
    """int32 ``[T]``."""
    num_keys: torch.Tensor
    """int32 ``[T]``."""
    max_num_keys: int


def latent_caches(num_blocks: int) -> dict[str, torch.Tensor]:
    """Both formats of the latent cache: "auto" (bfloat16) and "fp8_ds_mla"; contents are independent."""
    fp8 = torch.empty(num_blocks, BLOCK_SIZE, LATENT_FP8_NBYTES, device="cuda", dtype=torch.uint8)
    views = latent_fp8_views(fp8)
    views.nope_fp8.copy_(torch.randn(views.nope_fp8.shape, device="cuda") * 0.5)
    views.nope_scale.copy_(torch.rand(views.nope_scale.shape, device="cuda") + 0.5)
    views.rope.copy_(torch.randn(views.rope.shape, device="cuda"))
    plain = torch.randn(num_blocks, BLOCK_SIZE, LATENT_DIM, device="cuda", dtype=torch.bfloat16)
    return {"auto": plain, FP8_DS_MLA: fp8}


def index_keys(num_blocks: int) -> torch.Tensor:
    """An index-key cache, uint8 of nominal shape ``[num_blocks, 64, 132]``."""
    cache = torch.empty(num_blocks, BLOCK_SIZE, INDEX_KEY_NBYTES, device="cuda", dtype=torch.uint8)
    views = index_key_views(cache)
    views.key_fp8.copy_(torch.randn(views.key_fp8.shape, device="cuda"))
    views.key_scale.copy_(2.0 ** torch.randint(-3, 1, views.key_scale.shape, device="cuda"))
    return cache


def index_problem(num_requests: int, rows_per_request: int, length: int, num_blocks: int) -> IndexProblem:
    """The last rows of requests of one length, each row seeing what precedes it, in pages at random places."""
    num_tokens = num_requests * rows_per_request
    pages = -(-length // BLOCK_SIZE)
    if num_requests * pages <= num_blocks:
        block_table = torch.randperm(num_blocks, device="cuda")[: num_requests * pages].view(num_requests, pages)
    else:
        block_table = torch.randint(num_blocks, (num_requests, pages), device="cuda")
    request_ids = torch.arange(num_requests, device="cuda", dtype=torch.int32)
    num_keys = torch.arange(length - rows_per_request + 1, length + 1, device="cuda", dtype=torch.int32)
    return IndexProblem(
        q_fp8=torch.randn(num_tokens, NUM_INDEX_HEADS, INDEX_DIM, device="cuda").to(torch.float8_e4m3fn),
        weights=torch.randn(num_tokens, NUM_INDEX_HEADS, device="cuda"),
        block_table=block_table.to(torch.int32).contiguous(),
        request_ids=request_ids.repeat_interleave(rows_per_request),
        num_keys=num_keys.repeat(num_requests),
        max_num_keys=length,
    )
