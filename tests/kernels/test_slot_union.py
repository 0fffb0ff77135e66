"""What four adjacent tokens have selected between them: the kernel on the CPU, and on a GPU of SM 90."""

from functools import partial

import pytest
import torch

from kernels.emulated import spilled_nbytes
from kernels.slot_union_cases import assert_united, selections, union_on_cpu
from kernels.sparse_mla_cuda_cases import needs_hopper, needs_library
from vllm_dsv32.kernels.slot_union_cuda import Places, unite

NO_PLACES = Places.none(torch.device("cpu"))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return union_on_cpu(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def on_cpu(monkeypatch, kernel):
    """All slots of a group are united, unless a test says otherwise; takes the order of threads."""

    def call(slots, valid, max_share=1.0, places=NO_PLACES, seed=0):
        monkeypatch.setattr(torch.ops.vllm_dsv32, "slot_union", partial(kernel, seed=seed), raising=False)
        return unite(slots, valid, max_share, places)

    return call


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
    assert_united(on_cpu(slots, valid), slots, valid)


@pytest.mark.parametrize("num_rows", [1, 2, 50, 3000])
def test_slots_that_a_token_has_again_on_cpu(on_cpu, num_rows):
    torch.manual_seed(1)
    valid = torch.tensor([2048, 1500, 100, 1], dtype=torch.int32)
    slots = torch.randint(num_rows, (4, 2048), dtype=torch.int32)
    assert_united(on_cpu(slots, valid), slots, valid)


def test_slots_that_meet_in_the_table_on_cpu(on_cpu):
    """Pages in order, and slots whose hashes are near each other."""
    valid = torch.full((4,), 2048, dtype=torch.int32)
    inverse = pow(2654435769, -1, 2**32)
    near = torch.tensor([hash_ * inverse % 2**32 for hash_ in range(30_000)])
    near = near[near < 2**31][: 4 * 2048].reshape(4, -1).int()
    for slots in (torch.arange(4 * 2048, dtype=torch.int32).reshape(4, -1), near):
        assert_united(on_cpu(slots, valid), slots, valid)


def test_counts_out_of_range_on_cpu(on_cpu):
    slots, valid = selections(70, [70, 70, 70, 70], 0.5)
    got = on_cpu(slots, valid + torch.tensor([7, 0, -77, 0], dtype=torch.int32))
    assert_united(got, slots, torch.tensor([70, 70, 0, 70]))


def test_results_do_not_depend_on_the_order_of_threads(on_cpu):
    torch.manual_seed(1)
    valid = torch.tensor([300, 511, 512, 400], dtype=torch.int32)
    slots = torch.randint(700, (4, 512), dtype=torch.int32)
    wanted = on_cpu(slots, valid)
    for seed in range(1, 7):
        assert_equal(on_cpu(slots, valid, seed=seed), wanted)


def assert_equal(got, wanted):
    for name, x in vars(wanted).items():
        assert torch.equal(getattr(got, name), x)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.58, 0.6, 0.7, 1.0])
def test_groups_that_share_little_are_not_united_on_cpu(on_cpu, overlap):
    """With each token as with the last, 9/16 of all are in the union at 7/12 shared."""
    slots, valid = selections(240, [240] * 8 + [0] * 4 + [240, 3, 0, 200], overlap)
    got = on_cpu(slots, valid, 9 / 16)
    assert_united(got, slots, valid, 9 / 16)
    assert (got.num_slots[:2] == -1).all() == (overlap < 7 / 12)


def test_groups_just_at_the_share_on_cpu(on_cpu):
    """Of 16 slots a union may have 9; of the 8 of the first two tokens, 6.5."""
    first, second = list(range(4)), list(range(2, 6))
    third = list(range(5, 9))
    slots = torch.tensor(
        [
            *(first, second, third, third),  # 9
            *(first, second, third, [5, 6, 7, 9]),  # 10
            *(first, [3, 4, 5, 6], first, first),  # 7
            *(first, [4, 5, 6, 7], first, first),  # 8, but the first two share nothing
        ],
        dtype=torch.int32,
    )
    valid = torch.full((16,), 4, dtype=torch.int32)
    got = on_cpu(slots, valid, 9 / 16)
    assert_united(got, slots, valid, 9 / 16)
    assert [int(count) for count in got.num_slots] == [9, -1, -1, -1]


@pytest.mark.parametrize("block_size", [1, 16, 48, 64])
def test_places_of_pages_on_cpu(on_cpu, block_size):
    """Each page of a united group has one, from the first on, and no other page; slots keep their offsets."""
    slots, valid = selections(300, [300, 300, 200, 300, 0, 0, 0, 0, 300, 300, 300, 300], 0.8, num_rows=4000)
    slots[8:10] = torch.arange(600, dtype=torch.int32).view(2, 300) + 4000  # a group that shares nothing
    wanted = on_cpu(slots, valid, 9 / 16)
    assert wanted.num_slots.tolist()[1:] == [0, -1]
    for seed in range(3):
        places = Places.for_cache(torch.empty(-(-5000 // block_size), block_size, 1))
        got = on_cpu(slots, valid, 9 / 16, places, seed)
        num_union = int(wanted.num_slots[0])
        named = wanted.slots[0, :num_union]
        num_pages = int(places.table[0])
        assert sorted(places.pages[:num_pages].tolist()) == (named // block_size).unique().tolist()
        assert int((places.table[1:] > 0).sum()) == num_pages
        placed = got.slots[0, :num_union]
        assert torch.equal(places.pages[placed // block_size] * block_size + placed % block_size, named)
        for name in ("num_slots", "num_left"):
            assert torch.equal(getattr(got, name), getattr(wanted, name))
        num_tiles = -(-num_union // 64)
        assert torch.equal(got.seen[0, :num_tiles], wanted.seen[0, :num_tiles])


def test_more_pages_than_places_on_cpu(on_cpu):
    slots, valid = selections(100, [100] * 4, 0.9, num_rows=1000)
    table, pages = torch.zeros(101, dtype=torch.int32), torch.full((8,), -5, dtype=torch.int32)
    on_cpu(slots, valid, 1.0, Places(table, pages[:7], 10))
    assert int(table[0]) > 7
    assert len(set(pages.tolist())) == 8
    assert int(pages[7]) == -5


def test_registers_suffice(tmp_path):
    assert spilled_nbytes("slot_union_sm90", tmp_path) == [0]


@needs_library
@needs_hopper
@pytest.mark.parametrize("overlap", [0.0, 0.8, 1.0])
def test_union(overlap):
    slots, valid = (x.cuda() for x in selections(2048, [2048] * 60 + [0, 1, 63, 2047], overlap))
    no_places = Places.none(slots.device)
    got = unite(slots, valid, 1.0, no_places)
    assert_united(got, slots, valid)
    for _ in range(20):
        again = unite(slots, valid, 1.0, no_places)
        assert torch.equal(again.num_slots, got.num_slots)
        for group, count in enumerate(got.num_slots.tolist()):
            assert torch.equal(again.slots[group, :count], got.slots[group, :count])
            assert torch.equal(again.seen[group, : -(-count // 64)], got.seen[group, : -(-count // 64)])


@needs_library
@needs_hopper
@pytest.mark.parametrize("overlap", [0.0, 0.8, 1.0])
def test_union_of_what_shares_enough(overlap):
    """Blocks ask for places of the same pages at once."""
    slots, valid = (x.cuda() for x in selections(2048, [2048] * 600, overlap, num_rows=32 << 10))
    wanted = unite(slots, valid, 9 / 16, Places.none(slots.device))
    assert_united(wanted, slots, valid, 9 / 16)
    assert bool((wanted.num_slots > 0).all()) == (overlap > 0.5)
    for _ in range(20):
        places = Places.for_cache(torch.empty(512, 64, 1, device="cuda"))
        got = unite(slots, valid, 9 / 16, places)
        assert torch.equal(got.num_slots, wanted.num_slots)
        assert torch.equal(got.num_left, wanted.num_left)
        num_pages = int(places.table[0])
        assert len(places.pages[:num_pages].unique()) == num_pages
        for group, count in enumerate(got.num_slots.tolist()):
            placed = got.slots[group, : max(0, count)]
            rows = places.pages[placed // 64] * 64 + placed % 64
            assert torch.equal(rows, wanted.slots[group, : max(0, count)])
