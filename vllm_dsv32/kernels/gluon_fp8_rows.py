"""Rows of an ``fp8_ds_mla`` cache on their way to tensor cores, inside Gluon kernels for SM 90.

The bytes of rows are copied to shared memory in the background, and decoded there into bfloat16, a group of 128
values at a time. Values are decoded without their scales, which go to scores and weights, and 2^-120 of what they
are (see :mod:`vllm_dsv32.kernels.triton_latent`). They come out in an order of their own, in which queries are put
beforehand, and out of which the output is put at the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vllm_dsv32.kernels.gluon_rows import LATENT, copy_rows, fill_queries, row_chunk
from vllm_dsv32.kernels.triton_latent import TWO_POW_60
from vllm_dsv32.layout import LATENT_FP8_NBYTES

__all__ = ["FP8_ROW_CHUNKS", "copy_fp8_tile", "decode_group", "fill_fp8_queries", "load_scales", "store_group"]

FP8_ROW_CHUNKS = gl.constexpr(LATENT_FP8_NBYTES // 16)

# From Triton 3.9 on, the method has another name.
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def copy_fp8_tile(
    raw_ring: gl.shared_memory_descriptor,
    first_group: gl.tensor,
    rope: gl.shared_memory_descriptor,
    word_ptr: gl.tensor,
    rope_ptr: gl.tensor,
    chunk: gl.tensor,
    WORDS: gl.constexpr,
    LINE: gl.constexpr,
) -> None:
    """Have the rows of a tile copied; the caller commits.

    Args:
        raw_ring: for groups of bytes, int32 ``[groups, KEYS, 32]``.
        first_group: of the four to write.
        rope: for what is rotated, bfloat16 ``[KEYS, 64]``.
        word_ptr: to the words of the first row.
        rope_ptr: to what is rotated of it.
        chunk: int64 ``[KEYS]``, where each row begins from there.
        WORDS: which thread copies what of the words; a group must be decoded in the same layout.
        LINE: the same of what is rotated.
    """
    for g in gl.static_range(4):
        copy_rows(raw_ring.index(first_group + g), word_ptr + g * 32, chunk, WORDS)
    copy_rows(rope, rope_ptr, gl.convert_layout(chunk, gl.SliceLayout(1, LINE)), LINE)


@gluon.jit
def decode_group(raw: gl.shared_memory_descriptor, tile: gl.shared_memory_descriptor, WORDS: gl.constexpr) -> None:
    """Bytes of a group to bfloat16, times 2^-120: first those at even places, then those at odd ones."""
    words = raw.load(WORDS)
    # The arithmetic shift brings in signs, which the mask removes.
    even = ((words & 0x007F007F) << 4) | ((words & 0x00800080) << 8)
    odd = ((words >> 4) & 0x07F007F0) | (words & -0x7FFF8000)
    # In one store: lines of 128 bytes with the even ones, then lines with the odd ones.
    both = gl.reshape(gl.permute(gl.join(even, odd), (0, 2, 1)), (raw.shape[0], 64))
    _reinterpret(tile, gl.int32, [raw.shape[0], 64], gl.NVMMASharedLayout(128, 32, 2)).store(both)


@gluon.jit
def load_scales(
    scale_ptr: gl.tensor, slot: gl.tensor, page_chunks: gl.tensor, BLOCK_SIZE: gl.constexpr
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """The scales of the four groups of the rows of slots."""
    at = scale_ptr + row_chunk(slot, page_chunks, BLOCK_SIZE, FP8_ROW_CHUNKS) * 4
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def fill_fp8_queries(
    q_groups: gl.shared_memory_descriptor,
    q_rope: gl.shared_memory_descriptor,
    q_rows: gl.tensor,
    exists: gl.tensor,
    LINE: gl.constexpr,
) -> None:
    """Write queries to shared memory, each group in the order of decoded values and times 2^60."""
    place = gl.arange(0, 128, layout=gl.SliceLayout(0, LINE))
    dim = place % 64 // 2 * 4 + place % 2 * 2 + place // 64
    for g in gl.static_range(4):
        q = gl.load(q_rows[:, None] + g * 128 + dim[None, :], mask=exists[:, None], other=0.0)
        q_groups.index(g).store((q.to(gl.float32) * TWO_POW_60).to(gl.bfloat16))
    fill_queries(q_rope, q_rows, exists, LATENT, LINE)


@gluon.jit
def store_group(
    out_ptr: gl.tensor, group: gl.tensor, num_heads: gl.tensor, DIM: gl.constexpr, OUT: gl.constexpr
) -> None:
    """A group of the output, ``[HEADS, 128]`` in the order of decoded values, to 128 columns of rows of 512.

    Args:
        out_ptr: to the row of the first head.
        group: of which only so many heads exist:
        num_heads: those.
        DIM: the first of the columns.
        OUT: which thread writes what.
    """
    HEADS: gl.constexpr = group.shape[0]
    out = gl.permute(gl.reshape(group, (HEADS, 2, 32, 2)), (0, 2, 3, 1))
    out = gl.convert_layout(gl.reshape(out, (HEADS, 128)), OUT)
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, OUT))
    dim = gl.arange(0, 128, layout=gl.SliceLayout(0, OUT))
    gl.store(
        out_ptr + DIM + (head * LATENT)[:, None] + dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(head < num_heads)[:, None],
    )
