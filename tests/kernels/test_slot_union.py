"""What four adjacent tokens have selected between them: the kernel on the CPU, and on a GPU of SM 90."""

import pytest
import torch

from kernels.emulated import spilled_nbytes
from kernels.slot_union_cases import assert_united, selections, union_on_cpu, unite_with
from kernels.sparse_mla_cuda_cases import needs_hopper, needs_library
from vllm_dsv32.kernels import sparse_mla_cuda_union


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return union_on_cpu(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.mark.parametrize("overlap", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(
    ("num_slots", "counts"),
    [
        (2048, [2048, 2048, 2048, 2048]),
        (2048, [0, 1, 2047, 1025]),
        (100, [100, 99, 63, 64, 0, 0, 0, 0, 0, 0, 0, 1]),
        (1, [1, 1, 1, 1, 0, 0, 1, 0]),
    ],
)
def test_union_on_cpu(on_cpu, num_slots, counts, overlap):
    slots, valid = selections(num_slots, counts, overlap)
    assert_united(unite_with(on_cpu, slots, valid), slots, valid)


@pytest.mark.parametrize("num_rows", [1, 2, 50, 3000])
def test_slots_that_a_token_has_again_on_cpu(on_cpu, num_rows):
    torch.manual_seed(1)
    valid = torch.tensor([2048, 1500, 100, 1], dtype=torch.int32)
    slots = torch.randint(num_rows, (4, 2048), dtype=torch.int32)
    assert_united(unite_with(on_cpu, slots, valid), slots, valid)


def test_slots_that_meet_in_the_table_on_cpu(on_cpu):
    """Pages in order, and slots whose hashes are near each other."""
    valid = torch.full((4,), 2048, dtype=torch.int32)
    inverse = pow(2654435769, -1, 2**32)
    near = torch.tensor([hash_ * inverse % 2**32 for hash_ in range(30_000)])
    near = near[near < 2**31][: 4 * 2048].reshape(4, -1).int()
    for slots in (torch.arange(4 * 2048, dtype=torch.int32).reshape(4, -1), near):
        assert_united(unite_with(on_cpu, slots, valid), slots, valid)


def test_counts_out_of_range_on_cpu(on_cpu):
    slots, valid = selections(70, [70, 70, 70, 70], 0.5)
    got = unite_with(on_cpu, slots, valid + torch.tensor([7, 0, -77, 0], dtype=torch.int32))
    assert_united(got, slots, torch.tensor([70, 70, 0, 70]))


def test_results_do_not_depend_on_the_order_of_threads(on_cpu):
    torch.manual_seed(1)
    valid = torch.tensor([300, 511, 512, 400], dtype=torch.int32)
    slots = torch.randint(700, (4, 512), dtype=torch.int32)
    wanted = unite_with(on_cpu, slots, valid)
    for seed in range(1, 7):
        for again, first in zip(unite_with(on_cpu, slots, valid, seed=seed), wanted, strict=True):
            assert torch.equal(again, first)


def test_registers_suffice(tmp_path):
    assert spilled_nbytes("slot_union_sm90", tmp_path) == [0]


@needs_library
@needs_hopper
@pytest.mark.parametrize("overlap", [0.0, 0.8, 1.0])
def test_union(overlap):
    slots, valid = (x.cuda() for x in selections(2048, [2048] * 60 + [0, 1, 63, 2047], overlap))
    got = sparse_mla_cuda_union.unite(slots, valid)
    assert_united(got, slots, valid)
    for _ in range(20):
        again = sparse_mla_cuda_union.unite(slots, valid)
        assert torch.equal(again[1], got[1])
        for group, count in enumerate(got[1].tolist()):
            assert torch.equal(again[0][group, :count], got[0][group, :count])
            assert torch.equal(again[2][group, : -(-count // 64)], got[2][group, : -(-count // 64)])
