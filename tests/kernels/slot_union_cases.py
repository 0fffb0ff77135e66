"""Selections of four tokens, their union made naively, and the kernel that makes it under the emulator."""

import ctypes

import torch

from kernels.emulated import emulated

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


def united(slots, valid):
    """Of each group the slots of its union, and which of the four tokens has each, as bits."""
    unions = []
    for group in range(0, len(valid), 4):
        places, union = {}, []
        for token in range(4):
            own = set()
            for slot in slots[group + token, : valid[group + token]].tolist():
                if slot in own or slot not in places:
                    places.setdefault(slot, len(union))
                    union.append([slot, 1 << token])
                else:
                    union[places[slot]][1] |= 1 << token
                own.add(slot)
        unions.append(union)
    return unions


def assert_united(got, slots, valid):
    """Of the results of ``unite``; tiles that are not written may be anything."""
    union_slot, num_union, seen = (x.cpu() for x in got)
    for group, wanted in enumerate(united(slots.cpu(), valid.cpu())):
        assert int(num_union[group]) == len(wanted)
        assert union_slot[group, : len(wanted)].tolist() == [slot for slot, _ in wanted]
        num_tiles = -(-len(wanted) // 64)
        tokens = [tokens for _, tokens in wanted] + [0] * (num_tiles * 64 - len(wanted))
        assert tokens_of_keys(seen[group, :num_tiles]) == tokens


def tokens_of_keys(seen):
    """Of int64 [tiles, 4], for each key of the tiles which of the four tokens have it, as bits."""
    key = torch.arange(64)
    bit = key % 8 // 2 * 16 + key // 8 * 2 + key % 2
    has = seen.unsqueeze(1) >> bit.unsqueeze(1) & 1
    return (has << torch.arange(4)).sum(-1).flatten().tolist()


class Arguments(ctypes.Structure):
    """SlotUnionArguments of csrc/slot_union_sm90.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("topk_slot", "num_valid", "union_slot", "num_union", "seen")),
        *((name, ctypes.c_int) for name in ("num_groups", "num_slots")),
    )


def union_on_cpu(directory):
    """The kernel, on what the operator takes."""
    function = emulated("slot_union", directory).slot_union_on_cpu
    function.restype = ctypes.c_char_p

    def call(slots, valid, union_slot, num_union, seen, seed=0):
        tensors = (slots, valid, union_slot, num_union, seen)
        arguments = Arguments(*(x.data_ptr() for x in tensors), len(valid) // 4, slots.shape[1])
        assert function(ctypes.byref(arguments), seed) is None

    return call


def unite_with(operator, slots, valid, **options):
    """All results, poisoned first."""
    num_groups, num_slots = len(valid) // 4, slots.shape[1] * 4
    union_slot = torch.full((num_groups, num_slots), GARBAGE, dtype=torch.int32)
    num_union = torch.full((num_groups,), GARBAGE, dtype=torch.int32)
    seen = torch.full((num_groups, -(-num_slots // 64), 4), -1)
    operator(slots, valid, union_slot, num_union, seen, **options)
    return union_slot, num_union, seen
