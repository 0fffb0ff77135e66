"""What both CUDA kernels of sparse_mla do with scales, queries and NaN, on the CPU: products are of float16."""

import pytest
import torch

from kernels.inputs import close
from kernels.sparse_mla_cuda_cases import assert_near, kernel_on_cpu, problem, rounded_to_float16
from vllm_dsv32.kernels import sparse_mla
from vllm_dsv32.layout import latent_fp8_views

HEADS = {"sparse_mla": 16, "sparse_mla_wide": 72}
PROBLEM = ([70, 3, 130], 192, 512)
"""Of problem(): whole tiles and parts of them."""


@pytest.fixture(scope="module", params=HEADS)
def kernel(request, tmp_path_factory):
    return request.param, kernel_on_cpu(request.param, tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def num_heads(kernel):
    return HEADS[kernel[0]]


@pytest.fixture
def on_cpu(kernel):
    """Of many heads, splits are joined by another kernel."""
    name, call = kernel

    def attend(*arguments, num_splits=1):
        return call(*arguments, num_splits if name == "sparse_mla" else 1)

    return attend


@pytest.fixture
def reference(kernel):
    """Of rows as the kernel has them."""
    rows = rounded_to_float16 if kernel[0] == "sparse_mla_wide" else lambda cache: cache
    return lambda q, cache, *rest: sparse_mla.reference(q.float(), rows(cache), *rest)


@pytest.mark.parametrize("factor", [2.0**-120, 2.0**-100, 2.0**-20, 2.0**20, 2.0**100])
def test_queries_of_any_magnitude_on_cpu(on_cpu, reference, num_heads, factor):
    q, *rest, scale = problem(num_heads, *PROBLEM)
    arguments = (q * factor, *rest, scale / factor)
    assert_near(on_cpu(*arguments, num_splits=2), reference(*arguments))


def test_dimensions_heads_and_parts_of_queries_far_apart_on_cpu(on_cpu, reference, num_heads):
    q, *rest = problem(num_heads, *PROBLEM)
    q[0, :, 3:512:7] *= 2.0**-20
    q[1, ::2] *= 2.0**-100
    q[2, :8, :512] *= 2.0**-100  # the rotary part alone
    q[2, 8:, 512:] *= 2.0**-100
    assert_near(on_cpu(q, *rest, num_splits=2), reference(q, *rest))


def test_queries_of_zero_average_the_rows_on_cpu(on_cpu, reference, num_heads):
    q, *rest = problem(num_heads, *PROBLEM)
    out, lse = on_cpu(q * 0, *rest, num_splits=2)
    assert_near((out, lse), reference(q * 0, *rest))
    counts = torch.tensor(PROBLEM[0]).float().unsqueeze(-1)
    torch.testing.assert_close(lse, counts.log().expand(-1, num_heads))


def test_infinite_queries_make_their_head_nan_on_cpu(on_cpu, reference, num_heads):
    q, *rest = problem(num_heads, *PROBLEM)
    wanted, wanted_lse = reference(q, *rest)
    head = 4
    for dim in (5, 570):
        for value in (torch.inf, -torch.inf, torch.nan):
            q[1, head, dim] = value
            wanted[1, head] = wanted_lse[1, head] = torch.nan
            head += 2
    out, lse = on_cpu(q, *rest, num_splits=2)
    close(lse, wanted_lse, rtol=1e-5, atol=2e-5)
    close(out, wanted, rtol=2**-7, atol=2**-7 * float(wanted.nan_to_num().abs().max()))


def test_scores_beyond_float32_make_nan_on_cpu(on_cpu, num_heads):
    q, *rest = problem(num_heads, *PROBLEM)
    out, lse = on_cpu(q.sign() * 2.0**127, *rest, num_splits=2)
    assert bool(lse.isnan().all())
    assert bool(out.isnan().all())


def scaled(arguments, factors):
    """The arguments with every scale times its factor, float32 [512, 4]; queries keep scores from growing."""
    q, cache, *rest = arguments
    views = latent_fp8_views(cache)
    views.nope_scale.mul_(factors.unflatten(0, views.nope_scale.shape[:2]))
    by_group = factors.max(0).values.clamp(min=2.0**-100).repeat_interleave(128)
    return torch.cat((q[..., :512] / by_group, q[..., 512:]), -1).bfloat16(), cache, *rest


@pytest.mark.parametrize("factors", ["small", "great", "between keys and groups", "between groups"])
def test_scales_far_apart_on_cpu(on_cpu, reference, num_heads, factors):
    arguments = problem(num_heads, *PROBLEM)
    shape = (512, 4)
    of = {
        "small": torch.full(shape, 2.0**-60),
        "great": torch.full(shape, 2.0**60),
        "between keys and groups": torch.exp2(torch.randint(-12, 13, shape).float()),
        "between groups": torch.tensor([2.0**-14, 1.0, 2.0**-7, 2.0**7]).expand(shape),
    }
    arguments = scaled(arguments, of[factors])
    wanted = reference(*arguments)
    assert_near(on_cpu(*arguments), wanted)
    if num_heads == HEADS["sparse_mla"]:
        assert_near(on_cpu(*arguments, num_splits=3), wanted)


@pytest.mark.parametrize("of", [slice(None), slice(0, None, 3)])
def test_scales_of_zero_on_cpu(on_cpu, reference, num_heads, of):
    """Of all keys, and of some: their rotary parts have scores, and the highest ones at that."""
    arguments = problem(num_heads, *PROBLEM)
    arguments[0][..., 512:] *= 40
    latent_fp8_views(arguments[1]).nope_scale[:, of] = 0
    assert_near(on_cpu(*arguments, num_splits=3), reference(*arguments))


@pytest.mark.parametrize("part", ["nope_scale", "nope_fp8", "rope"])
def test_rows_of_nan_matter_to_tokens_that_select_them_alone_on_cpu(on_cpu, reference, num_heads, part):
    """Blocks take one token after the other, and what NaN was copied to serves the next ones."""
    num_valid = [150, 64, 130, 30, 1, 65, 0, 129]
    arguments = problem(num_heads, num_valid, 192, 512)
    wanted, wanted_lse = reference(*arguments)
    cache, slots = arguments[1:3]
    for token in (0, 1, 2):
        slots[token, : num_valid[token]] += 512
    wide = torch.cat((cache, cache))
    poisoned = latent_fp8_views(wide[8:])
    if part == "nope_fp8":
        poisoned.nope_fp8.view(torch.uint8)[..., -1] = 0x7F
    else:
        getattr(poisoned, part)[..., -1] = torch.nan
    wanted_lse[:3] = torch.nan
    for num_splits in (1, 2) if num_heads == HEADS["sparse_mla"] else (1,):
        out, lse = on_cpu(arguments[0], wide, *arguments[2:], num_splits=num_splits)
        close(lse, wanted_lse, rtol=1e-5, atol=2e-5)
        assert bool(out[:3, :, -1].isnan().all())
        close(out[3:], wanted[3:], rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))
