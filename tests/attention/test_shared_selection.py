"""Ranks that share a selection, one after the other in one process: what each gathers is what all have."""

from dataclasses import replace

import pytest
import torch

from kernels.inputs import PROBLEM, index_cache
from vllm_dsv32.attention.shared_selection import SelectionShare, select_shared
from vllm_dsv32.kernels.dispatch import select_kernels
from vllm_dsv32.kernels.selection import select
from vllm_dsv32.layout import index_key_views

TOPK = 24
KERNELS = select_kernels(replace(PROBLEM, device_type="cpu", capability=None, topk=TOPK))


def batch(num_tokens: int, generator: torch.Generator) -> tuple:
    """Two requests, in other pages of each cache: the first's tokens see up to as many keys, the second decodes."""
    num_blocks = -(-num_tokens // 16) + 1
    cache = index_cache(2 * num_blocks, 16)
    views = index_key_views(cache)
    views.key_fp8.copy_(torch.randn(views.key_fp8.shape, generator=generator))
    views.key_scale.fill_(0.5)
    num_keys = torch.arange(1, num_tokens + 1, dtype=torch.int32)
    num_keys[-1] = min(40, num_tokens)
    request_ids = torch.zeros_like(num_keys)
    request_ids[-1] = 1
    return (
        torch.randn(num_tokens, 4, 128, generator=generator).to(torch.float8_e4m3fn),
        torch.randn(num_tokens, 4, generator=generator),
        cache,
        torch.randperm(2 * num_blocks, generator=generator).int().view(2, num_blocks),
        request_ids,
        num_keys,
        num_keys.masked_fill(num_keys <= TOPK, 0),
        max(num_tokens, 40),
        torch.randperm(2 * num_blocks, generator=generator).int().view(2, num_blocks),
        16,
    )


@pytest.mark.parametrize("num_tokens", [1, 5, 63, 64, 65, 128, 129, 150, 300])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_all_ranks_have_what_one_would_have_alone(generator, size, num_tokens):
    arguments = batch(num_tokens, generator)
    alone = torch.full((num_tokens, TOPK), -7, dtype=torch.int32)
    select(KERNELS, *arguments, alone)
    parts: list[torch.Tensor] = []

    def run(rank: int, gather) -> torch.Tensor:
        topk_slot = torch.full((num_tokens, TOPK), -7, dtype=torch.int32)
        select_shared(SelectionShare(rank, size, gather, worth_from=0), KERNELS, *arguments, topk_slot)
        return topk_slot

    for rank in range(size):  # a first pass, to have every rank's part
        run(rank, lambda part: parts.append(part.clone()) or part.repeat(size, 1))
    assert len({part.shape for part in parts}) == 1
    for rank in range(size):
        gathered = run(rank, lambda part, rank=rank: check(part, parts[rank]) or torch.cat(parts))
        assert torch.equal(gathered, alone)


def check(part: torch.Tensor, expected: torch.Tensor) -> None:
    assert part.dtype == torch.float32  # what every gather takes; its bits are slots
    assert torch.equal(part.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    ("num_tokens", "num_before", "most"),
    [(n, 160_000, 1.03) for n in (410, 512, 513, 576, 1000)] + [(8192, 0, 1.15)],
)
def test_parts_are_disjoint_and_alike_in_work(num_tokens, num_before, most):
    size = 8
    tokens = [
        SelectionShare(rank, size, torch.clone, 0).rows(num_tokens, torch.device("cpu")) for rank in range(size)
    ]
    dealt = torch.cat(tokens).sort().values
    assert torch.equal(dealt, torch.arange(len(dealt)).clamp(max=num_tokens - 1))
    work = torch.stack([(num_before + rows).double().sum() for rows in tokens])
    assert work.max() / work.mean() < most


@pytest.mark.parametrize(
    ("size", "worth_from", "num_tokens", "max_query_len", "max_num_keys", "taken"),
    [
        (8, 1 << 26, 8192, 8192, 8192, True),
        (8, 1 << 26, 8192, 8192, 8191, False),
        (8, 1 << 26, 2048, 2048, 163_840, True),
        (8, 0, 64, 64, 64, True),
        (8, 0, 512, 4, 163_840, False),  # decoding, with drafts
        (8, None, 8192, 8192, 163_840, False),
        (1, 0, 8192, 8192, 163_840, False),
    ],
)
def test_when_it_is_shared(size, worth_from, num_tokens, max_query_len, max_num_keys, taken):
    share = SelectionShare(0, size, torch.clone, worth_from)
    assert share.takes(num_tokens, max_query_len, max_num_keys) is taken
