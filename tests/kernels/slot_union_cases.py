"""Selections of four tokens, their union made naively, and the kernels that make and fill it under the emulator."""

import ctypes
from functools import partial

import torch

from kernels.emulated import emulated
from kernels.sparse_mla_cuda_cases import assert_near
from vllm_dsv32.kernels import sparse_mla
from vllm_dsv32.layout import is_fp8_ds_mla

GARBAGE = -(2**31)


def selections(num_slots, counts, overlap, num_rows=1 << 20):
    """Slots of tokens, each with such a share of those of the one before, in any order; garbage past the counts."""
    torch.manual_seed(1)
    rows = []
    mine = torch.randperm(num_rows)[:num_slots]
    for _ in counts:
        num_kept = round(overlap * num_slots)
        others = torch.randperm(num_rows)
        others = others[~torch.isin(others, mine)][: num_slots - num_kept]
        mine = torch.cat((mine[torch.randperm(num_slots)][:num_kept], others))[torch.randperm(num_slots)]
        rows.append(mine)
    slots, valid = torch.stack(rows).int(), torch.tensor(counts, dtype=torch.int32)
    slots[torch.arange(num_slots) >= valid.unsqueeze(1)] = GARBAGE
    return slots, valid


def united(slots, valid, max_share=1.0):
    """Of each group the slots of its union, and which of the four tokens has each, as bits; or None."""
    unions = []
    for group in range(0, len(valid), 4):
        places, union = {}, []
        counts = valid[group : group + 4].clamp(min=0).tolist()
        for token, count in enumerate(counts):
            own = set()
            for slot in slots[group + token, :count].tolist():
                if slot in own or slot not in places:
                    places.setdefault(slot, len(union))
                    union.append([slot, 1 << token])
                else:
                    union[places[slot]][1] |= 1 << token
                own.add(slot)
        of_two = {slot for token in range(2) for slot in slots[group + token, : counts[token]].tolist()}
        shares_enough = len(of_two) <= (max_share + 0.25) * sum(counts[:2])
        unions.append(union if shares_enough and len(union) <= max_share * sum(counts) else None)
    return unions


def assert_united(got, slots, valid, max_share=1.0):
    """Of the results of ``unite``; tiles that are not written may be anything."""
    slots, valid = slots.cpu(), valid.cpu()
    num_left = got.num_left.cpu().view(-1, 4)
    for group, wanted in enumerate(united(slots, valid, max_share)):
        if wanted is None:
            assert int(got.num_slots[group]) == -1
            assert num_left[group].tolist() == valid[group * 4 : group * 4 + 4].clamp(min=0).tolist()
            continue
        assert int(got.num_slots[group]) == len(wanted)
        assert num_left[group].tolist() == [-1] * 4
        assert got.slots[group, : len(wanted)].tolist() == [slot for slot, _ in wanted]
        num_tiles = -(-len(wanted) // 64)
        tokens = [tokens for _, tokens in wanted] + [0] * (num_tiles * 64 - len(wanted))
        assert tokens_of_keys(got.seen[group, :num_tiles].cpu()) == tokens


def tokens_of_keys(seen):
    """Of int64 [tiles, 4], for each key of the tiles which of the four tokens have it, as bits."""
    key = torch.arange(64)
    bit = key % 8 // 2 * 16 + key // 8 * 2 + key % 2
    has = seen.unsqueeze(1) >> bit.unsqueeze(1) & 1
    return (has << torch.arange(4)).sum(-1).flatten().tolist()


class PlacesArguments(ctypes.Structure):
    """PagePlaces of csrc/latent_pages_sm90.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("count", "place_of_page", "page_of_place")),
        *((name, ctypes.c_int) for name in ("capacity", "block_size")),
    )

    @classmethod
    def of(cls, table, pages, block_size):
        if len(table) == 0:
            return cls()
        return cls(table.data_ptr(), table.data_ptr() + 4, pages.data_ptr(), len(pages), block_size)


class UnionArguments(ctypes.Structure):
    """SlotUnionArguments of csrc/slot_union_sm90.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("topk_slot", "num_valid", "union_slot", "num_union", "seen", "num_left")
        ),
        ("places", PlacesArguments),
        ("max_share", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("num_groups", "num_slots")),
    )


class PagesArguments(ctypes.Structure):
    """LatentPagesArguments of csrc/latent_pages_sm90.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cache", "num_valid")),
        ("places", PlacesArguments),
        *((name, ctypes.c_void_p) for name in ("latents", "num_union", "num_left")),
        ("page_nbytes", ctypes.c_int64),
        ("num_groups", ctypes.c_int),
    )


def union_on_cpu(directory):
    """The kernel, as its operator is called."""
    function = emulated("slot_union", directory).slot_union_on_cpu
    function.restype = ctypes.c_char_p

    def call(slots, valid, max_share, block_size, *results, seed=0):
        *out, table, pages = results
        for x in out:
            x.fill_(GARBAGE)
        arguments = UnionArguments(
            *(x.data_ptr() for x in (slots, valid, *out)),
            PlacesArguments.of(table, pages, block_size),
            max_share,
            *(len(valid) // 4, slots.shape[1]),
        )
        assert function(ctypes.byref(arguments), seed) is None

    return call


def pages_on_cpu(directory):
    """The kernel, as its operator is called."""
    function = emulated("latent_pages", directory).latent_pages_on_cpu
    function.restype = ctypes.c_char_p

    def call(cache, valid, table, pages, latents, num_union, num_left, seed=0):
        latents.fill_(torch.nan)
        arguments = PagesArguments(
            *(x.data_ptr() for x in (cache, valid)),
            PlacesArguments.of(table, pages, cache.shape[1]),
            *(x.data_ptr() for x in (latents, num_union, num_left)),
            *(cache.stride(0), len(num_union)),
        )
        assert function(ctypes.byref(arguments), seed) is None

    return call


def rounded(cache):
    """Rows of an fp8 cache as those of unions are multiplied."""
    num_blocks, block_size, _ = cache.shape
    slots = torch.arange(num_blocks * block_size, device=cache.device).view(num_blocks, -1)
    return sparse_mla.gather_latent(cache, slots).bfloat16()


def assert_attended(got, q, cache, slots, valid, scale, num_whole=None):
    out, lse = got
    empty = valid == 0
    assert not out[empty].any()
    assert bool((lse[empty] == -torch.inf).all())
    num_whole = len(valid) if num_whole is None else num_whole
    assert_near(got, wanted(q, cache, slots, valid, scale, num_whole // 4 * 4))


def wanted(q, cache, slots, valid, scale, num_grouped):
    """With an fp8 cache, of tokens that are united from rounded rows."""
    of_rows = partial(sparse_mla.reference, q.float(), topk_slot=slots, num_valid=valid, scale=scale)
    alone = of_rows(cache=cache)
    if not is_fp8_ds_mla(cache):
        return alone
    is_united = torch.zeros(len(valid), dtype=torch.bool)
    unions = united(slots[:num_grouped].cpu(), valid[:num_grouped].cpu(), 9 / 16)
    for group, union in enumerate(unions):
        is_united[4 * group : 4 * group + 4] = union is not None
    is_united = is_united.to(q.device)
    for x, together in zip(alone, of_rows(cache=rounded(cache)), strict=True):
        x[is_united] = together[is_united]
    return alone
