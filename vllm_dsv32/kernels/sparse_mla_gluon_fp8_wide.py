"""The kernel of ``sparse_mla`` in Gluon for more than 32 heads and an ``fp8_ds_mla`` cache.

As the wide kernel for bfloat16, but what is copied are the bytes of rows: the warpgroups decode them into a tile of
bfloat16 that both products read. Shared memory has room for the bytes of one tile: those of the next one are copied
once this one is decoded. With up to 32 heads, half of each product or more would be padding.
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

__all__ = ["HEADS", "KEYS", "NUM_WARPS", "sparse_mla_fp8_wide_kernel"]

HEADS = 64
"""Of a program."""
KEYS = 64
"""Of a tile."""
NUM_WARPS = 8


@gluon.jit(do_not_specialize=["num_splits", "num_slots"])
def sparse_mla_fp8_wide_kernel(
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
    """A split of one token for 64 heads; see the launch in ``sparse_mla_gluon``."""
    wait_for_launches_before(DEPENDENT)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, KEYS // 2, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    # Eight threads copy a line of 128 bytes, the period of the swizzle: as words, and as bfloat16.
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    RAW: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    HEAD_TILES: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    part, token, begin, end = keys_of_program(num_valid_ptr, num_splits, KEYS, HEAD_TILES)
    if SPLIT and begin >= end:
        return

    raw_ring = gl.allocate_shared_memory(gl.int32, [4, KEYS, 32], RAW)
    rope_ring = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], LINES)
    # Allocated one by one: what the compiler keeps in order is accesses to one allocation.
    tile_0 = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, 128], LINES)
    tile_1 = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, 128], LINES)
    tile_2 = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, 128], LINES)
    tile_3 = gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, 128], LINES)
    weights_0 = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], LINES)
    weights_1 = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], LINES)
    weights_2 = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], LINES)
    weights_3 = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], LINES)
    q_groups = gl.allocate_shared_memory(gl.bfloat16, [4, HEADS, 128], LINES)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], LINES)

    slots = topk_slot_ptr + token * num_slots
    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, WORDS))
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
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

    highest = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    denominator = gl.zeros([HEADS, KEYS], gl.float32, SCORES)
    acc_0 = gl.zeros([HEADS, 128], gl.float32, ACC)
    acc_1 = gl.zeros([HEADS, 128], gl.float32, ACC)
    acc_2 = gl.zeros([HEADS, 128], gl.float32, ACC)
    acc_3 = gl.zeros([HEADS, 128], gl.float32, ACC)
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
        none = gl.zeros([HEADS, KEYS], gl.float32, SCORES)
        part_r = warpgroup_mma(q_rope, rope_ring.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)

        decode_group(raw_ring.index(zero), decoded_0, WORDS)
        decode_group(raw_ring.index(zero + 1), decoded_1, WORDS)
        decode_group(raw_ring.index(zero + 2), decoded_2, WORDS)
        decode_group(raw_ring.index(zero + 3), decoded_3, WORDS)
        fence_async_shared()
        k_0, k_1 = decoded_0.permute((1, 0)), decoded_1.permute((1, 0))
        k_2, k_3 = decoded_2.permute((1, 0)), decoded_3.permute((1, 0))
        part_0 = warpgroup_mma(q_groups.index(zero), k_0, none, use_acc=False, is_async=True)
        part_1 = warpgroup_mma(q_groups.index(zero + 1), k_1, none, use_acc=False, is_async=True)
        part_2 = warpgroup_mma(q_groups.index(zero + 2), k_2, none, use_acc=False, is_async=True)
        part_3 = warpgroup_mma(q_groups.index(zero + 3), k_3, none, use_acc=False, is_async=True)

        # A thread copies what it has decoded itself: none overwrites what another still reads.
        if start + KEYS < end:
            chunk = row_chunk(slot, page_chunks, BLOCK_SIZE, FP8_ROW_CHUNKS)
            following = rope_ring.index(gl.where(stage == 0, 1, stage - 1))
            copy_fp8_tile(raw_ring, 0, following, word_ptr, rope_ptr, chunk, WORDS, LINE)
        async_copy.commit_group()
        slot = load_slot(slots, start + 2 * KEYS + row, end)
        next_0, next_1, next_2, next_3 = load_scales(scale_ptr, scale_slot, page_chunks, BLOCK_SIZE)
        scale_slot = load_slot(slots, start + 2 * KEYS + key, end)
        part_r, part_0, part_1, part_2, part_3 = warpgroup_mma_wait(
            0, deps=[part_r, part_0, part_1, part_2, part_3]
        )

        scale_0 = (scale_0 * TWO_POW_60)[None, :]
        scale_1 = (scale_1 * TWO_POW_60)[None, :]
        scale_2 = (scale_2 * TWO_POW_60)[None, :]
        scale_3 = (scale_3 * TWO_POW_60)[None, :]
        scores = part_r + part_0 * scale_0 + part_1 * scale_1 + part_2 * scale_2 + part_3 * scale_3
        scores = gl.where((start + key < end)[None, :], scores * scale_log2, float("-inf"))
        previous = highest
        highest = gl.maximum(previous, gl.max(scores, axis=1))
        shrink = gl.exp2(previous - highest)
        weight = gl.exp2(scores - highest[:, None])
        denominator = denominator * shrink[:, None] + weight
        weights_0.store((weight * scale_0).to(gl.bfloat16))
        weights_1.store((weight * scale_1).to(gl.bfloat16))
        weights_2.store((weight * scale_2).to(gl.bfloat16))
        weights_3.store((weight * scale_3).to(gl.bfloat16))
        fence_async_shared()
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, ACC))[:, None]
        acc_0 = warpgroup_mma(weights_0, decoded_0, acc_0 * shrink, is_async=True)
        acc_1 = warpgroup_mma(weights_1, decoded_1, acc_1 * shrink, is_async=True)
        acc_2 = warpgroup_mma(weights_2, decoded_2, acc_2 * shrink, is_async=True)
        acc_3 = warpgroup_mma(weights_3, decoded_3, acc_3 * shrink, is_async=True)
        acc_0, acc_1, acc_2, acc_3 = warpgroup_mma_wait(0, deps=[acc_0, acc_1, acc_2, acc_3])
        scale_0, scale_1, scale_2, scale_3 = next_0, next_1, next_2, next_3
        # Not 1 - stage: from that the compiler would know.
        stage = gl.where(stage + 1 == 2, 0, stage + 1)

    total = gl.sum(denominator, axis=1)
    # Without keys: zeros, and minus infinity.
    total = gl.where(total == 0.0, 1.0, total)
    normaliser = gl.convert_layout(TWO_POW_60 / total, gl.SliceLayout(1, ACC))[:, None]
    lse = highest + gl.log2(total)
    if not SPLIT:
        lse = lse * LN_2
    result = part.to(gl.int64) * NUM_HEADS + first
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, SCORES))
    gl.store(lse_ptr + result + head, lse, mask=head < exists)
    out_ptr += result * LATENT
    store_group(out_ptr, acc_0 * normaliser, exists, 0, OUT)
    store_group(out_ptr, acc_1 * normaliser, exists, 128, OUT)
    store_group(out_ptr, acc_2 * normaliser, exists, 256, OUT)
    store_group(out_ptr, acc_3 * normaliser, exists, 384, OUT)
