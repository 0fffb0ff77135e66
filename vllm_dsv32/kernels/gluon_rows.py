"""Rows of the latent cache on their way to shared memory, inside Gluon kernels for SM 90.

Gluon is Triton with layouts and asynchronous copies written out. Here it serves for what Triton cannot do: rows
gathered by slot are copied to shared memory by the hardware while tensor cores work on the rows before.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from vllm_dsv32.layout import KV_LORA_RANK, LATENT_DIM, ROPE_DIM

__all__ = [
    "BFLOAT16_ROW_CHUNKS",
    "LATENT",
    "ROPE",
    "copy_async",
    "copy_rows",
    "copy_tile",
    "fill_queries",
    "keys_of_program",
    "load_slot",
    "open_token",
    "row_chunk",
    "wait_for_launches_before",
]

LATENT = gl.constexpr(KV_LORA_RANK)
ROPE = gl.constexpr(ROPE_DIM)
BFLOAT16_ROW_CHUNKS = gl.constexpr(LATENT_DIM // 8)

# From Triton 3.9 on, the function has another name.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def wait_for_launches_before(DEPENDENT: gl.constexpr) -> None:
    """See the function of that name in ``triton_dependent_launch``."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@gluon.jit
def keys_of_program(
    num_valid_ptr: gl.tensor, num_splits: gl.tensor, KEYS: gl.constexpr, HEAD_TILES: gl.constexpr
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Which of a launch's results a program computes, for which token, and the range of keys for it.

    The split of a token's keys is that of ``keys_of_split`` in ``sparse_mla_join_triton``.
    """
    part = gl.program_id(0) // HEAD_TILES
    token = (part // num_splits).to(gl.int64)
    num_keys = gl.load(num_valid_ptr + token)
    split_size = gl.maximum(gl.cdiv(gl.cdiv(num_keys, num_splits), KEYS), 1) * KEYS
    begin = part % num_splits * split_size
    return part, token, begin, gl.minimum(begin + split_size, num_keys)


@gluon.jit
def load_slot(slots: gl.tensor, key: gl.tensor, end: gl.tensor) -> gl.tensor:
    """The slot of a key; from ``end`` on, that of the last key, so that only valid rows are ever read."""
    key = gl.minimum(key, end - 1)
    return gl.load(slots + key, mask=key >= 0, other=0)


@gluon.jit
def row_chunk(
    slot: gl.tensor, page_chunks: gl.tensor, BLOCK_SIZE: gl.constexpr, ROW_CHUNKS: gl.constexpr
) -> gl.tensor:
    """Where the row of a slot begins, in chunks of 16 bytes, so that the compiler knows how rows are aligned."""
    return (slot // BLOCK_SIZE).to(gl.int64) * page_chunks + slot % BLOCK_SIZE * ROW_CHUNKS


@gluon.jit
def copy_rows(tile: gl.shared_memory_descriptor, row_ptr: gl.tensor, chunk: gl.tensor, COPY: gl.constexpr) -> None:
    """Have the first columns of rows copied to a tile of shared memory; the caller commits.

    Args:
        tile: the shared memory, ``[KEYS, columns]``.
        row_ptr: to a first row, in the type of the tile.
        chunk: int64 ``[KEYS]``, where each row begins from there.
        COPY: which thread copies what.
    """
    PER_CHUNK: gl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    column = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, COPY))
    copy_async(tile, row_ptr + (chunk * PER_CHUNK)[:, None] + column[None, :])


@gluon.jit
def copy_tile(
    rope: gl.shared_memory_descriptor,
    latent: gl.shared_memory_descriptor,
    cache_ptr: gl.tensor,
    chunk: gl.tensor,
    COPY: gl.constexpr,
) -> None:
    """Have both parts of bfloat16 rows copied; the caller commits."""
    copy_rows(rope, cache_ptr + LATENT, chunk, COPY)
    copy_rows(latent, cache_ptr, chunk, COPY)


@gluon.jit
def fill_queries(
    tile: gl.shared_memory_descriptor, q_rows: gl.tensor, exists: gl.tensor, FIRST: gl.constexpr, COPY: gl.constexpr
) -> None:
    """Write columns of queries to a tile of shared memory, and zeros for heads that do not exist."""
    column = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, COPY))
    tile.store(gl.load(q_rows[:, None] + FIRST + column[None, :], mask=exists[:, None], other=0.0))


@gluon.jit
def open_token(
    q_ptr: gl.tensor,
    cache_ptr: gl.tensor,
    slots: gl.tensor,
    token: gl.tensor,
    begin: gl.tensor,
    end: gl.tensor,
    page_chunks: gl.tensor,
    NUM_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEADS: gl.constexpr,
    KEYS: gl.constexpr,
    COPY: gl.constexpr,
) -> tuple[
    gl.shared_memory_descriptor,
    gl.shared_memory_descriptor,
    gl.shared_memory_descriptor,
    gl.shared_memory_descriptor,
    gl.tensor,
    gl.tensor,
]:
    """Rings of two tiles of bfloat16 rows, whose first is under way, and a token's queries, all in shared memory.

    Returns:
        Both rings, both parts of the queries, the first head, and the slots of the second tile.
    """
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    HEAD_TILES: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    latent_ring = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, LATENT], LINES)
    rope_ring = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], LINES)
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [HEADS, LATENT], LINES)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], LINES)

    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, COPY))
    if begin < end:
        chunk = row_chunk(load_slot(slots, begin + row, end), page_chunks, BLOCK_SIZE, BFLOAT16_ROW_CHUNKS)
        copy_tile(rope_ring.index(0), latent_ring.index(0), cache_ptr, chunk, COPY)
    async_copy.commit_group()
    slot = load_slot(slots, begin + KEYS + row, end)

    first = gl.program_id(0) % HEAD_TILES * HEADS
    head = first + gl.arange(0, HEADS, layout=gl.SliceLayout(1, COPY))
    q_rows = q_ptr + (token * NUM_HEADS + head) * (LATENT + ROPE)
    fill_queries(q_latent, q_rows, head < NUM_HEADS, 0, COPY)
    fill_queries(q_rope, q_rows, head < NUM_HEADS, LATENT, COPY)
    return latent_ring, rope_ring, q_latent, q_rope, first, slot
