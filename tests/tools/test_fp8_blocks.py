import pytest
import torch

from vllm_dsv32.tools.fp8_blocks import dequantize_blocks, quantize_blocks


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (576, 256), (127, 129)])
def test_error_is_within_half_a_step_of_e4m3(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, shape[1])
    weight_fp8, scale = quantize_blocks(weight)
    assert weight_fp8.dtype == torch.float8_e4m3fn
    assert weight_fp8.shape == weight.shape
    assert weight_fp8.is_contiguous()
    assert scale.shape == tuple(-(-size // 128) for size in shape)
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round())), "scales are powers of two"
    restored = dequantize_blocks(weight_fp8, scale)
    steps = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    # Three mantissa bits, and subnormals in steps of 2**-9.
    bound = torch.maximum(weight.abs() * 2**-4, steps * 2**-10)
    assert torch.all((restored - weight).abs() <= bound)
    assert torch.equal(restored, restored.bfloat16().float()), "exact in bfloat16"


def test_each_block_matches_a_loop() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * 3
    weight_fp8, scale = quantize_blocks(weight)
    for row in range(3):
        for col in range(2):
            block = weight[row * 128 : row * 128 + 128, col * 128 : col * 128 + 128]
            exponent = -40
            while block.abs().max() / 2.0**exponent > 448:
                exponent += 1
            assert scale[row, col] == 2.0**exponent
            expected = (block / 2.0**exponent).to(torch.float8_e4m3fn).float()
            part = weight_fp8[row * 128 : row * 128 + 128, col * 128 : col * 128 + 128].float()
            assert torch.equal(part, expected)


def test_block_of_zeros_has_scale_one() -> None:
    weight_fp8, scale = quantize_blocks(torch.zeros(128, 256))
    assert torch.equal(scale, torch.ones(1, 2))
    assert not weight_fp8.float().any()
