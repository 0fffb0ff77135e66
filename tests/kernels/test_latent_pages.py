"""Pages of an fp8 cache in bfloat16: the kernel on the CPU, and on a GPU of SM 90."""

import pytest
import torch

from kernels.emulated import spilled_nbytes
from kernels.inputs import latent_cache
from kernels.slot_union_cases import pages_on_cpu
from kernels.sparse_mla_cuda_cases import needs_hopper, needs_library
from vllm_dsv32.kernels import sparse_mla
from vllm_dsv32.layout import latent_fp8_views


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return pages_on_cpu(tmp_path_factory.mktemp("cuda_on_cpu"))


def fp8_cache(num_blocks, block_size):
    """All codes but those of NaN, among rows whose scales are small, large and zero."""
    torch.manual_seed(1)
    cache = latent_cache(num_blocks, block_size, "fp8_ds_mla", gap_nbytes=64)
    views = latent_fp8_views(cache)
    codes = torch.randint(127, views.nope_fp8.shape, dtype=torch.uint8)
    views.nope_fp8.view(torch.uint8)[:] = codes | torch.randint(2, codes.shape, dtype=torch.uint8) << 7
    views.nope_scale[:] = torch.exp2(torch.randint(-40, 40, views.nope_scale.shape).float()) * 1.37
    views.nope_scale[0, 0] = 0.0
    views.rope[:] = torch.randn(views.rope.shape).bfloat16()
    return cache


def decoded(cache, pages):
    block_size = cache.shape[1]
    slots = pages.unsqueeze(1) * block_size + torch.arange(block_size, device=cache.device)
    return sparse_mla.gather_latent(cache, slots).bfloat16()


def decode(operator, cache, pages, num_places, num_groups=3):
    """Pages that were given places, of which some may be left; and what groups and tokens are told."""
    table = torch.zeros(1 + len(cache), dtype=torch.int32)
    table[0] = len(pages)
    table[1 + pages.long()] = 1 + torch.arange(len(pages), dtype=torch.int32)
    pages = torch.cat((pages, pages.new_full((num_places,), 2**31 - 1)))[:num_places].int()
    valid = torch.arange(-1, 4 * num_groups - 1, dtype=torch.int32)
    num_union, num_left = torch.arange(num_groups).int(), torch.full((4 * num_groups,), -7).int()
    latents = torch.full((num_places, cache.shape[1], 576), torch.nan, dtype=torch.bfloat16)
    tensors = [x.to(cache.device) for x in (valid, table, pages, latents, num_union, num_left)]
    operator(cache, *tensors)
    return [x.cpu() for x in tensors[3:]]


def assert_decoded(operator, cache, pages, num_places):
    latents, num_union, num_left = decode(operator, cache, pages, num_places)
    assert torch.equal(latents[: len(pages)], decoded(cache, pages.to(cache.device)).cpu())
    assert bool(latents[len(pages) :].isnan().all())
    assert num_union.tolist() == [0, 1, 2]
    assert num_left.tolist() == [-7] * 12


def assert_left(operator, cache, pages, num_places):
    latents, num_union, num_left = decode(operator, cache, pages, num_places)
    assert bool(latents.isnan().all())
    assert num_union.tolist() == [-1, -1, -1]
    assert num_left.tolist() == [0, *range(11)]


@pytest.mark.parametrize("block_size", [1, 16, 48, 64])
def test_pages_on_cpu(on_cpu, block_size):
    cache = fp8_cache(9, block_size)
    for pages in ([], [0], [8, 0, 3, 4, 5, 7]):
        assert_decoded(on_cpu, cache, torch.tensor(pages, dtype=torch.int32), 6)


def test_more_pages_than_places_on_cpu(on_cpu):
    assert_left(on_cpu, fp8_cache(9, 16), torch.arange(5, dtype=torch.int32), 4)
    assert_decoded(on_cpu, fp8_cache(9, 16), torch.arange(4, dtype=torch.int32), 4)


def test_nan_stays_where_it_is_on_cpu(on_cpu):
    cache = fp8_cache(1, 16)
    latent_fp8_views(cache).nope_fp8.view(torch.uint8)[0, 3, 77] = 255
    latents, *_ = decode(on_cpu, cache, torch.zeros(1, dtype=torch.int32), 1)
    assert latents.isnan().nonzero().tolist() == [[0, 3, 77]]


def test_registers_suffice(tmp_path):
    assert spilled_nbytes("latent_pages_sm90", tmp_path) == [0]


@pytest.mark.parametrize("block_size", [16, 48, 64])
@needs_library
@needs_hopper
def test_pages(block_size):
    operator = torch.ops.vllm_dsv32.latent_pages
    cache = fp8_cache(700, block_size).cuda()
    for num_pages in (0, 1, 300, 699):
        pages = torch.randperm(700)[:num_pages].int()
        assert_decoded(operator, cache, pages, 699)
        assert_left(operator, cache, torch.randperm(700).int(), 699)
