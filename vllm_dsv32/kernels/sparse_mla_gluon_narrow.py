"""The kernel of ``sparse_mla`` in Gluon for up to 16 heads and a bfloat16 cache.

A warpgroup attends 16 heads of one token to its slots, 64 at a time. Keys are the rows of both products
(S^T = K Q^T, O^T = V^T P^T): wgmma takes 64 rows, but as few as 8 columns. While one tile is multiplied, the next
one is copied, which keeps 72 KiB of each multiprocessor under way: enough for the bandwidth of the memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vllm_dsv32.kernels.gluon_rows import (
    BFLOAT16_ROW_CHUNKS,
    LATENT,
    copy_tile,
    keys_of_program,
    load_slot,
    open_token,
    row_chunk,
    wait_for_launches_before,
)
from vllm_dsv32.kernels.sparse_mla_join_triton import LN_2

__all__ = ["HEADS", "KEYS", "NUM_WARPS", "sparse_mla_narrow_kernel"]

HEADS = 16
"""Of a program."""
KEYS = 64
"""Of a tile."""
NUM_WARPS = 4


@gluon.jit(do_not_specialize=["num_splits", "num_slots"])
def sparse_mla_narrow_kernel(
    q_ptr: gl.tensor,
    cache_ptr: gl.tensor,
    topk_slot_ptr: gl.tensor,
    num_valid_ptr: gl.tensor,
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    scale_log2: gl.tensor,
    num_splits: gl.tensor,
    num_slots: gl.tensor,
    page_chunks: gl.tensor,
    NUM_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    SPLIT: gl.constexpr,
    HEADS: gl.constexpr,
    KEYS: gl.constexpr,
    DEPENDENT: gl.constexpr,
) -> None:
    """A split of one token for 16 heads; see the launch in ``sparse_mla_gluon``."""
    wait_for_launches_before(DEPENDENT)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    # Eight threads copy a line of 128 bytes, the period of the swizzle.
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(2 * HEADS, 16, 2)
    HEAD_TILES: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    part, token, begin, end = keys_of_program(num_valid_ptr, num_splits, KEYS, HEAD_TILES)
    if SPLIT and begin >= end:
        return

    slots = topk_slot_ptr + token * num_slots
    latent_ring, rope_ring, q_latent, q_rope, first, slot = open_token(
        q_ptr, cache_ptr, slots, token, begin, end, page_chunks, NUM_HEADS, BLOCK_SIZE, HEADS, KEYS, COPY
    )
    weights = gl.allocate_shared_memory(gl.bfloat16, [KEYS, HEADS], WEIGHTS)

    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, COPY))
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, MMA))
    highest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    denominator = gl.zeros([KEYS, HEADS], gl.float32, MMA)
    acc = gl.zeros([LATENT, HEADS], gl.float32, MMA)
    index = 0
    for start in range(begin, end, KEYS):
        async_copy.wait_group(0)
        fence_async_shared()
        latent = latent_ring.index(index % 2)
        rope = rope_ring.index(index % 2)
        scores = gl.zeros([KEYS, HEADS], gl.float32, MMA)
        scores = warpgroup_mma(rope, q_rope.permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma(latent, q_latent.permute((1, 0)), scores, is_async=True)

        if start + KEYS < end:
            chunk = row_chunk(slot, page_chunks, BLOCK_SIZE, BFLOAT16_ROW_CHUNKS)
            copy_tile(rope_ring.index((index + 1) % 2), latent_ring.index((index + 1) % 2), cache_ptr, chunk, COPY)
        async_copy.commit_group()
        slot = load_slot(slots, start + 2 * KEYS + row, end)

        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where((start + key < end)[:, None], scores * scale_log2, float("-inf"))
        previous = highest
        highest = gl.maximum(previous, gl.max(scores, axis=0))
        shrink = gl.exp2(previous - highest)[None, :]
        weight = gl.exp2(scores - highest[None, :])
        denominator = denominator * shrink + weight
        weights.store(weight.to(gl.bfloat16))
        fence_async_shared()
        acc = warpgroup_mma(latent.permute((1, 0)), weights, acc * shrink, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        index += 1  # noqa: SIM113 (kernels have no enumerate)

    total = gl.sum(denominator, axis=0)
    # Without keys: zeros, and minus infinity.
    total = gl.where(total == 0.0, 1.0, total)
    acc = acc * (1.0 / total)[None, :]
    lse = highest + gl.log2(total)
    if not SPLIT:
        lse = lse * LN_2
    result = part.to(gl.int64) * NUM_HEADS + first
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, MMA))
    gl.store(lse_ptr + result + head, lse, mask=first + head < NUM_HEADS)
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, OUT))
    dim = gl.arange(0, LATENT, layout=gl.SliceLayout(0, OUT))
    gl.store(
        out_ptr + result * LATENT + (head * LATENT)[:, None] + dim[None, :],
        gl.convert_layout(gl.permute(acc, (1, 0)), OUT).to(out_ptr.dtype.element_ty),
        mask=(first + head < NUM_HEADS)[:, None],
    )
