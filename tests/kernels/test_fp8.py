import pytest
import torch

from kernels import naive
from vllm_dsv32.kernels.fp8 import quantise_amax, quantise_ue8m0

CASES = {
    "normal": lambda g: torch.randn(6, 128, generator=g),
    "tiny": lambda g: torch.randn(6, 128, generator=g) * 1e-7,
    "huge": lambda g: torch.randn(6, 128, generator=g) * 1e6,
    "zeros": lambda g: torch.zeros(2, 128),
    "one outlier": lambda g: torch.cat((torch.full((2, 1), 1e4), torch.randn(2, 127, generator=g)), dim=1),
    "amax on a power of two": lambda g: torch.full((3, 128), 448.0 * 2**-5),
    "amax just above a power of two": lambda g: torch.full((3, 128), 448.0 * 2**-5).nextafter(torch.tensor(9e9)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("quantise", "scale_of"),
    [(quantise_amax, naive.plain_scale), (quantise_ue8m0, naive.power_of_two_scale)],
    ids=["amax", "ue8m0"],
)
def test_values_and_scales_follow_the_format(generator, case, quantise, scale_of):
    x = CASES[case](generator)
    x_fp8, scale = quantise(x)
    for row, codes, got in zip(x.double().tolist(), x_fp8.view(torch.uint8).tolist(), scale.tolist(), strict=True):
        assert got == pytest.approx(scale_of(row), rel=1e-6)
        for value, code in zip(row, codes, strict=True):
            error = abs(naive.e4m3_decode(code) * got - value)
            # Nearest value: at most half a step of 2^-3 relative, or half of the smallest subnormal.
            assert error <= max(abs(value) * 2**-4, got * 2**-10) * (1 + 1e-5)


def test_the_power_of_two_is_rounded_up_exactly_where_it_should(generator):
    exact = torch.tensor([448.0 * 2.0**e for e in range(-12, 12)]).unsqueeze(1)
    _, scale = quantise_ue8m0(exact)
    assert scale.tolist() == [2.0**e for e in range(-12, 12)]
    _, scale = quantise_ue8m0(exact.nextafter(torch.tensor(torch.inf)))
    assert scale.tolist() == [2.0 ** (e + 1) for e in range(-12, 12)]


def test_the_naive_codec_agrees_with_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).double()
    ours = torch.tensor([naive.e4m3_decode(code) for code in range(256)], dtype=torch.float64)
    assert torch.equal(values.nan_to_num(nan=-1.0), ours.nan_to_num(nan=-1.0))
    probes = torch.tensor([0.0, 0.3, -0.3, 447.0, 1.0625, 1.1875, 2**-10, 3 * 2**-10, -17.0])
    assert [naive.e4m3_encode(p) for p in probes.tolist()] == probes.to(torch.float8_e4m3fn).view(
        torch.uint8
    ).tolist()
