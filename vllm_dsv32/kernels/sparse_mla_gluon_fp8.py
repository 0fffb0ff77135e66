"""The kernel of ``sparse_mla`` in Gluon for up to 16 heads and an ``fp8_ds_mla`` cache.

As the narrow kernel for bfloat16, but what is copied are the bytes of rows: a warpgroup decodes them into a tile
of bfloat16 that both products read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vllm_dsv32.kernels.gluon_fp8_rows import (
    FP8_ROW_CHUNKS,
    copy_fp8_tile,
    decode_group,
    fill_fp8_queries,
    load_scales,
    store_group,
)
from vllm_dsv32.kernels.gluon_rows import (
    LATENT,
    ROPE,
    keys_of_program,
    load_slot,
    row_chunk,
    wait_for_launches_before,
)
from vllm_dsv32.kernels.sparse_mla_join_triton import LN_2
from vllm_dsv32.kernels.triton_latent import TWO_POW_60

__all__ = ["HEADS", "KEYS", "NUM_WARPS", "sparse_mla_fp8_kernel"]

HEADS = 16
"""Of a program."""
KEYS = 64
"""Of a tile."""
NUM_WARPS = 4


@gluon.jit(do_not_specialize=["num_splits", "num_slots"])
def sparse_mla_fp8_kernel(
    q_ptr: gl.tensor,
    word_ptr: gl.tensor,
    scale_ptr: gl.tensor,
    rope_ptr: gl.tensor,
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
    # Eight threads copy a line of 128 bytes, the period of the swizzle: as words, and as bfloat16.
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(2 * HEADS, 16, 2)
    RAW: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    HEAD_TILES: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    part, token, begin, end = keys_of_program(num_valid_ptr, num_splits, KEYS, HEAD_TILES)
    if SPLIT and begin >= end:
        return

    raw_ring = gl.allocate_shared_memory(gl.int32, [2 * 4, KEYS, 32], RAW)
    rope_ring = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], LINES)
    # Allocated one by one: what the compiler keeps in order is accesses to one allocation.
    tile_0 = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, 128], LINES)
    tile_1 = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, 128], LINES)
    tile_2 = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, 128], LINES)
    tile_3 = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, 128], LINES)
    weights_0 = gl.allocate_shared_memory(gl.bfloat16, [KEYS, HEADS], WEIGHTS)
    weights_1 = gl.allocate_shared_memory(gl.bfloat16, [KEYS, HEADS], WEIGHTS)
    weights_2 = gl.allocate_shared_memory(gl.bfloat16, [KEYS, HEADS], WEIGHTS)
    weights_3 = gl.allocate_shared_memory(gl.bfloat16, [KEYS, HEADS], WEIGHTS)
    q_groups = gl.allocate_shared_memory(gl.bfloat16, [4, HEADS, 128], LINES)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], LINES)

    slots = topk_slot_ptr + token * num_slots
    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, WORDS))
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, MMA))
    if begin < end:
        chunk = row_chunk(load_slot(slots, begin + row, end), page_chunks, BLOCK_SIZE, FP8_ROW_CHUNKS)
        copy_fp8_tile(raw_ring, 0, rope_ring.index(0), word_ptr, rope_ptr, chunk, WORDS, LINE)
    async_copy.commit_group()
    slot = load_slot(slots, begin + KEYS + row, end)
    scale_slot = load_slot(slots, begin + key, end)
    scale_0, scale_1, scale_2, scale_3 = load_scales(scale_ptr, scale_slot, page_chunks, BLOCK_SIZE)
    scale_slot = load_slot(slots, begin + KEYS + key, end)

    first = gl.program_id(0) % HEAD_TILES * HEADS
    exists = NUM_HEADS - first
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, LINE))
    q_rows = q_ptr + (token * NUM_HEADS + first + head) * (LATENT + ROPE)
    fill_fp8_queries(q_groups, q_rope, q_rows, head < exists, LINE)

    highest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    denominator = gl.zeros([KEYS, HEADS], gl.float32, MMA)
    acc_0 = gl.zeros([128, HEADS], gl.float32, MMA)
    acc_1 = gl.zeros([128, HEADS], gl.float32, MMA)
    acc_2 = gl.zeros([128, HEADS], gl.float32, MMA)
    acc_3 = gl.zeros([128, HEADS], gl.float32, MMA)
    stage = 0
    for start in range(begin, end, KEYS):
        # Which the compiler does not know: it would hold the descriptors of all products in registers.
        zero = stage // 2
        decoded_0 = tile_0.index(zero)
        decoded_1 = tile_1.index(zero)
        decoded_2 = tile_2.index(zero)
        decoded_3 = tile_3.index(zero)
        async_copy.wait_group(0)
        fence_async_shared()
        none = gl.zeros([KEYS, HEADS], gl.float32, MMA)
        part_r = warpgroup_mma(rope_ring.index(stage), q_rope.permute((1, 0)), none, use_acc=False, is_async=True)

        if start + KEYS < end:
            chunk = row_chunk(slot, page_chunks, BLOCK_SIZE, FP8_ROW_CHUNKS)
            following = gl.where(stage == 0, 1, stage - 1)
            copy_fp8_tile(
                raw_ring, following * 4, rope_ring.index(following), word_ptr, rope_ptr, chunk, WORDS, LINE
            )
        async_copy.commit_group()
        slot = load_slot(slots, start + 2 * KEYS + row, end)
        next_0, next_1, next_2, next_3 = load_scales(scale_ptr, scale_slot, page_chunks, BLOCK_SIZE)
        scale_slot = load_slot(slots, start + 2 * KEYS + key, end)

        decode_group(raw_ring.index(stage * 4), decoded_0, WORDS)
        decode_group(raw_ring.index(stage * 4 + 1), decoded_1, WORDS)
        decode_group(raw_ring.index(stage * 4 + 2), decoded_2, WORDS)
        decode_group(raw_ring.index(stage * 4 + 3), decoded_3, WORDS)
        fence_async_shared()
        q_0, q_1 = q_groups.index(zero).permute((1, 0)), q_groups.index(zero + 1).permute((1, 0))
        q_2, q_3 = q_groups.index(zero + 2).permute((1, 0)), q_groups.index(zero + 3).permute((1, 0))
        part_0 = warpgroup_mma(decoded_0, q_0, none, use_acc=False, is_async=True)
        part_1 = warpgroup_mma(decoded_1, q_1, none, use_acc=False, is_async=True)
        part_2 = warpgroup_mma(decoded_2, q_2, none, use_acc=False, is_async=True)
        part_3 = warpgroup_mma(decoded_3, q_3, none, use_acc=False, is_async=True)
        part_r, part_0, part_1, part_2, part_3 = warpgroup_mma_wait(
            0, deps=[part_r, part_0, part_1, part_2, part_3]
        )

        scale_0 = (scale_0 * TWO_POW_60)[:, None]
        scale_1 = (scale_1 * TWO_POW_60)[:, None]
        scale_2 = (scale_2 * TWO_POW_60)[:, None]
        scale_3 = (scale_3 * TWO_POW_60)[:, None]
        scores = part_r + part_0 * scale_0 + part_1 * scale_1 + part_2 * scale_2 + part_3 * scale_3
        scores = gl.where((start + key < end)[:, None], scores * scale_log2, float("-inf"))
        previous = highest
        highest = gl.maximum(previous, gl.max(scores, axis=0))
        shrink = gl.exp2(previous - highest)[None, :]
        weight = gl.exp2(scores - highest[None, :])
        denominator = denominator * shrink + weight
        weights_0.store((weight * scale_0).to(gl.bfloat16))
        weights_1.store((weight * scale_1).to(gl.bfloat16))
        weights_2.store((weight * scale_2).to(gl.bfloat16))
        weights_3.store((weight * scale_3).to(gl.bfloat16))
        fence_async_shared()
        acc_0 = warpgroup_mma(decoded_0.permute((1, 0)), weights_0, acc_0 * shrink, is_async=True)
        acc_1 = warpgroup_mma(decoded_1.permute((1, 0)), weights_1, acc_1 * shrink, is_async=True)
        acc_2 = warpgroup_mma(decoded_2.permute((1, 0)), weights_2, acc_2 * shrink, is_async=True)
        acc_3 = warpgroup_mma(decoded_3.permute((1, 0)), weights_3, acc_3 * shrink, is_async=True)
        acc_0, acc_1, acc_2, acc_3 = warpgroup_mma_wait(0, deps=[acc_0, acc_1, acc_2, acc_3])
        scale_0, scale_1, scale_2, scale_3 = next_0, next_1, next_2, next_3
        # Not 1 - stage: from that the compiler would know.
        stage = gl.where(stage + 1 == 2, 0, stage + 1)

    total = gl.sum(denominator, axis=0)
    # Without keys: zeros, and minus infinity.
    total = gl.where(total == 0.0, 1.0, total)
    normaliser = (TWO_POW_60 / total)[None, :]
    lse = highest + gl.log2(total)
    if not SPLIT:
        lse = lse * LN_2
    result = part.to(gl.int64) * NUM_HEADS + first
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, MMA))
    gl.store(lse_ptr + result + head, lse, mask=head < exists)
    out_ptr += result * LATENT
    store_group(out_ptr, gl.permute(acc_0 * normaliser, (1, 0)), exists, 0, OUT)
    store_group(out_ptr, gl.permute(acc_1 * normaliser, (1, 0)), exists, 128, OUT)
    store_group(out_ptr, gl.permute(acc_2 * normaliser, (1, 0)), exists, 256, OUT)
    store_group(out_ptr, gl.permute(acc_3 * normaliser, (1, 0)), exists, 384, OUT)
