import pytest
import torch

from kernels import naive
from kernels.inputs import close, cos_sin_cache
from vllm_dsv32.kernels.rope import RopeLayout, rope_interleaved, rope_neox, rotate


@pytest.mark.parametrize("layout", RopeLayout)
@pytest.mark.parametrize("heads", [(), (3,)])
def test_rotation_follows_its_equation(generator, layout, heads):
    x = torch.randn(5, *heads, 64, generator=generator)
    rows = cos_sin_cache()[torch.tensor([0, 1, 7, 100, 299])]
    flat = x.reshape(5, -1, 64).double().tolist()
    expected = [
        [naive.rope(head, rows[t].double().tolist(), layout is RopeLayout.INTERLEAVED) for head in flat[t]]
        for t in range(5)
    ]
    close(rotate(x, rows, layout), torch.tensor(expected).reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_the_two_layouts_differ(generator):
    x = torch.randn(2, 64, generator=generator)
    rows = cos_sin_cache()[torch.tensor([3, 9])]
    assert not torch.allclose(rope_interleaved(x, rows), rope_neox(x, rows), atol=0.1)


def test_position_zero_is_the_identity(generator):
    x = torch.randn(1, 64, generator=generator)
    rows = cos_sin_cache()[:1]
    assert torch.equal(rope_interleaved(x, rows), x)
    assert torch.equal(rope_neox(x, rows), x)
