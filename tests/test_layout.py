import struct

import pytest
import torch

from vllm_dsv32 import layout


def page(num_blocks: int, block_size: int, width: int, gap_nbytes: int = 0) -> torch.Tensor:
    """A cache whose pages lie `gap_nbytes` apart, behind 256 bytes of something else."""
    stride = block_size * width + gap_nbytes
    memory = torch.zeros(256 + num_blocks * stride, dtype=torch.uint8)
    return memory[256:].as_strided((num_blocks, block_size, width), (stride, width, 1), 256)


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("gap_nbytes", [0, 512])
def test_latent_bytes(block_size, gap_nbytes):
    cache = page(3, block_size, 656, gap_nbytes)
    views = layout.latent_fp8_views(cache)
    views.nope_fp8[1, 5, 511] = 1.5
    views.nope_scale[1, 5, 3] = 0.25
    views.rope[1, 5, 63] = -2.0
    row = bytes(cache[1, 5].tolist())
    assert row[511] == 0b0_0111_100
    assert struct.unpack("<4f", row[512:528]) == (0.0, 0.0, 0.0, 0.25)
    assert row[528 + 2 * 63 :] == struct.pack("<f", -2.0)[2:]
    assert sum(map(bool, cache.flatten().tolist())) == sum(map(bool, row))


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("gap_nbytes", [0, 512])
def test_index_keys_lie_before_their_scales(block_size, gap_nbytes):
    cache = page(3, block_size, 132, gap_nbytes)
    views = layout.index_key_views(cache)
    views.key_fp8[2, 3, 7] = 1.0
    views.key_scale[2, 3] = 4.0
    block = bytes(cache[2].flatten().tolist())
    assert block[3 * 128 + 7] == 0b0_0111_000
    at = block_size * 128 + 3 * 4
    assert struct.unpack("<f", block[at : at + 4]) == (4.0,)
    assert sum(map(bool, cache.flatten().tolist())) == 1 + sum(map(bool, struct.pack("<f", 4.0)))


@pytest.mark.parametrize(
    ("views", "width"), [(layout.latent_fp8_views, 656), (layout.index_key_views, 132)], ids=["latent", "index"]
)
def test_another_tensor_is_refused(views, width):
    with pytest.raises(ValueError, match=rf"expected uint8 \[num_blocks, block_size, {width}\]"):
        views(torch.zeros(2, 16, width + 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        views(torch.zeros(2, 16, width, dtype=torch.int8))
    with pytest.raises(ValueError, match="with strides"):
        views(torch.zeros(2, 16, 2 * width, dtype=torch.uint8)[..., ::2])
