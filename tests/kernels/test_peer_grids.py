"""The test grids of FlashMLA, DeepGEMM and vLLM, with 8 and 16 heads added.

Shapes and tolerances are those of the peers' own tests: FlashMLA's test_flash_mla_sparse_decoding.py and
test_flash_mla_sparse_prefill.py, DeepGEMM's test_attention.py, vLLM's test_top_k_per_row.py. Too much for the
interpreter: without a GPU a small case of each stands for the grid.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.inputs import INTERPRETED, PROBLEM, index_cache, latent_cache
from kernels.sparse_mla_cuda_cases import rounded_to_float16
from vllm_dsv32.kernels import index_logits, sparse_mla, sparse_mla_cuda, topk_select_triton
from vllm_dsv32.kernels.dispatch import explain
from vllm_dsv32.layout import index_key_views, latent_fp8_views

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SCALE = 576**-0.5


def served_with(operation: str, **known: Any) -> list[Callable]:
    """The implementations that such a model can be served with, but for the reference."""
    problem = PROBLEM
    if GPU:
        problem = replace(PROBLEM, capability=torch.cuda.get_device_capability(), **known)
    rows = [row for row, refusal in explain(operation, problem) if refusal is None and row.graph_capturable]
    return [row.load() for row in rows if not row.by_name_only and (GPU or row.name in INTERPRETED)]


def sparse_mla_kernels(cache_format: str, num_heads: int) -> list[Callable]:
    cache_format = "auto" if cache_format == "bfloat16" else cache_format
    return served_with("sparse_mla", cache_format=cache_format, num_heads=num_heads)


def grid(*names: str, full: list[tuple], small: list[tuple]):
    return pytest.mark.parametrize(names, full if GPU else small)


def latent(cache_format: str, num_blocks: int, block_size: int, used: torch.Tensor) -> torch.Tensor:
    """A cache whose rows are NaN but for the used ones."""
    cache = latent_cache(num_blocks, block_size, cache_format).to(DEVICE)
    if cache_format == "fp8_ds_mla":
        views = latent_fp8_views(cache)
        at = (used // block_size, used % block_size)
        values = torch.randn(len(used), 512, device=DEVICE).clamp(-10, 10)
        views.nope_fp8.view(torch.uint8)[at] = values.to(torch.float8_e4m3fn).view(torch.uint8)
        views.nope_scale[at] = torch.rand(len(used), 4, device=DEVICE) / 10 + 0.05
        views.rope[at] = torch.randn(len(used), 64, device=DEVICE, dtype=torch.bfloat16) / 10
        return cache
    cache.view(-1, 576)[used] = (torch.randn(len(used), 576, device=DEVICE) / 10).to(cache.dtype)
    return cache


def attention_close(
    got: torch.Tensor, wanted: torch.Tensor, absolute: float, relative: float, cosine: float
) -> None:
    got, wanted = got.double(), wanted.double()
    assert not got.isnan().any()
    assert ((got - wanted).abs() <= absolute + relative * wanted.abs()).all()
    similarity = 2 * (got * wanted).sum() / (got.square() + wanted.square()).sum()
    assert 1 - similarity <= cosine or not wanted.any()


def lse_close(got: torch.Tensor, wanted: torch.Tensor, absolute: float, relative: float) -> None:
    assert torch.equal(got.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    assert ((got - wanted)[finite].abs() <= absolute + relative * wanted[finite].abs()).all()


def selected(num_tokens: int, topk: int, num_slots: int, *, correlated: bool) -> torch.Tensor:
    """Distinct slots; correlated: a token shares four fifths of them with the token before."""
    rows = [torch.randperm(num_slots)[:topk]]
    for _ in range(1, num_tokens):
        if correlated:
            kept = rows[-1][torch.randperm(topk)[: topk * 4 // 5]]
            fresh = torch.randperm(num_slots)
            fresh = fresh[~torch.isin(fresh, kept)][: topk - len(kept)]
            rows.append(torch.cat((kept, fresh)))
        else:
            rows.append(torch.randperm(num_slots)[:topk])
    return torch.stack(rows).to(torch.int32).to(DEVICE)


DECODE = [
    (cache_format, heads, batch, num_queries, keys, topk, page)
    for cache_format in ("fp8_ds_mla", "bfloat16")
    for heads in (8, 16, 64, 128)
    for batch in (4, 74, 321)
    for num_queries in (1, 3)
    for keys, topk, page in ((512, 64, 64), (1024, 576, 64), (2046, 2048, 64), (2046, 2048, 576))
    if heads < 64 or batch == 74
]


@grid(
    *("cache_format", "heads", "batch", "num_queries", "keys", "topk", "page"),
    full=DECODE,
    small=[("fp8_ds_mla", 8, 3, 1, 64, 32, 64), ("bfloat16", 8, 3, 1, 64, 32, 64)],
)
def test_flash_mla_decode(cache_format, heads, batch, num_queries, keys, topk, page):
    """Rows without any valid key among them; what no token selects is NaN."""
    torch.manual_seed(0)
    num_tokens = batch * num_queries
    num_blocks = -(-batch * keys // page)
    width = min(topk, keys)
    slots = torch.full((num_tokens, topk), num_blocks * page - 1, dtype=torch.int32, device=DEVICE)
    slots[:, :width] = selected(num_tokens, width, min(num_blocks * page - 1, 4 * keys), correlated=False)
    num_valid = torch.randint(0, width + 1, (num_tokens,), dtype=torch.int32, device=DEVICE)
    num_valid[0], num_valid[-1] = 0, width
    valid = torch.arange(topk, device=DEVICE) < num_valid.unsqueeze(1)
    cache = latent(cache_format, num_blocks, page, slots[valid].unique().long())
    q = (torch.randn(num_tokens, heads, 576, device=DEVICE) / 10).bfloat16()
    wanted, wanted_lse = sparse_mla.reference(q, cache, slots, num_valid, SCALE)
    for kernel in sparse_mla_kernels(cache_format, heads):
        out, lse = kernel(q, cache, slots, num_valid, SCALE)
        attention_close(out, wanted, 1e-3, 2.01 / 128, 5e-6)
        # FlashMLA's reference takes rows as its kernel rounds them, which the score of a single key shows.
        if (
            kernel is sparse_mla_cuda.sparse_mla
            and cache_format == "fp8_ds_mla"
            and heads > sparse_mla_cuda.MAX_HEADS
        ):
            _, lse_of_kernel = sparse_mla.reference(q.float(), rounded_to_float16(cache), slots, num_valid, SCALE)
        else:
            lse_of_kernel = wanted_lse
        lse_close(lse, lse_of_kernel, 1e-6, 8.01 / 65536)


@grid(
    *("heads", "num_queries", "keys", "topk", "correlated"),
    full=[
        (heads, num_queries, keys, topk, correlated)
        for heads in (8, 16, 64, 128)
        for num_queries, keys, topk in ((1, 128, 128), (62, 592, 128), (213, 1840, 256), (1521, 4096, 512))
        for correlated in (False, True)
        if not correlated or num_queries > 1
    ],
    small=[(8, 3, 64, 32, True)],
)
def test_flash_mla_prefill(heads, num_queries, keys, topk, correlated):
    torch.manual_seed(1)
    slots = selected(num_queries, topk, keys, correlated=correlated)
    num_valid = torch.full((num_queries,), topk, dtype=torch.int32, device=DEVICE)
    cache = latent("bfloat16", -(-keys // 64), 64, torch.arange(keys, device=DEVICE))
    q = (torch.randn(num_queries, heads, 576, device=DEVICE) / 10).bfloat16()
    wanted, wanted_lse = sparse_mla.reference(q, cache, slots, num_valid, SCALE)
    for kernel in sparse_mla_kernels("bfloat16", heads):
        out, lse = kernel(q, cache, slots, num_valid, SCALE)
        attention_close(out, wanted, 8e-4, 3.01 / 128, 7e-6)
        lse_close(lse, wanted_lse, 1e-6, 2.01 / 65536)


def index_inputs(num_tokens: int, num_requests: int, num_heads: int, lengths: torch.Tensor):
    num_blocks = -(-int(lengths.max()) // 64)
    cache = index_cache(num_requests * num_blocks, 64).to(DEVICE)
    views = index_key_views(cache)
    # In pieces: a float32 copy of all keys would be four times as large as they are.
    for block in range(0, len(cache), 4096):
        part = views.key_fp8[block : block + 4096]
        part.copy_(torch.randn(part.shape, device=DEVICE))
    views.key_scale.copy_(2.0 ** torch.randint(-4, 1, views.key_scale.shape, device=DEVICE))
    table = torch.randperm(len(cache), device=DEVICE).view(num_requests, num_blocks).to(torch.int32)
    q = torch.randn(num_tokens, num_heads, 128, device=DEVICE).to(torch.float8_e4m3fn)
    return q, torch.randn(num_tokens, num_heads, device=DEVICE), cache, table


def logits_close(arguments: tuple, num_keys: torch.Tensor) -> None:
    """DeepGEMM's measure of difference; twenty runs are equal to the bit."""
    visible = torch.arange(arguments[-1], device=DEVICE) < num_keys.unsqueeze(1)
    wanted = index_logits.reference(*arguments)[visible].double()
    for kernel in served_with("index_logits", num_index_heads=arguments[0].shape[1]):
        got = kernel(*arguments)[visible]
        x = got.double()
        assert 1 - 2 * (x * wanted).sum() / (x.square() + wanted.square()).sum() < 5e-6
        del x
        for _ in range(20 if GPU else 1):
            assert torch.equal(kernel(*arguments)[visible], got)


@grid(
    *("num_queries", "keys", "num_heads"),
    full=[
        (s, n, h) for s in (512, 2048) for n in (8192, 65536) for h in (32, 64) if s * n <= 2048 * 8192 or h == 64
    ],
    small=[(6, 96, 16)],
)
def test_deep_gemm_prefill(num_queries, keys, num_heads):
    torch.manual_seed(2)
    num_keys = torch.arange(keys - num_queries + 1, keys + 1, dtype=torch.int32, device=DEVICE)
    arguments = index_inputs(num_queries, 1, num_heads, num_keys)
    logits_close((*arguments, torch.zeros_like(num_keys), num_keys, keys), num_keys)


@grid(
    *("batch", "next_n", "average"),
    full=[
        (b, n, length) for b in (16, 256) for n in (1, 2, 4) for length in (8192, 65536) if b * length <= 256 * 8192
    ],
    small=[(3, 2, 90)],
)
def test_deep_gemm_paged(batch, next_n, average):
    torch.manual_seed(3)
    lengths = torch.randint(int(0.7 * average), int(1.3 * average), (batch,), device=DEVICE)
    num_keys = (lengths.unsqueeze(1) - torch.arange(next_n - 1, -1, -1, device=DEVICE)).flatten().to(torch.int32)
    request_ids = torch.arange(batch, dtype=torch.int32, device=DEVICE).repeat_interleave(next_n)
    arguments = index_inputs(batch * next_n, batch, 64 if GPU else 16, lengths)
    logits_close((*arguments, request_ids, num_keys, int(lengths.max())), num_keys)


@grid(
    *("num_rows", "length", "kind"),
    full=[
        (rows, length, kind)
        for rows in (1, 8, 64, 256)
        for length in (8192, 32768, 131072, 163840)
        for kind in ("normal", "ties", "ramp", "constant", "infinite")
    ],
    small=[(2, 300, kind) for kind in ("normal", "ties", "ramp", "constant", "infinite")],
)
def test_vllm_top_k(num_rows, length, kind):
    """Equal to a stable sort by value, then by position; what lies behind a row's keys is NaN or very high."""
    torch.manual_seed(4)
    k = 2048 if GPU else 32
    logits = torch.randn(num_rows, length, device=DEVICE)
    if kind == "ties":
        logits = (logits * 4).round()
    elif kind == "ramp":
        logits = torch.arange(length, device=DEVICE, dtype=torch.float32).expand(num_rows, -1).clone()
    elif kind == "constant":
        logits.fill_(1.5)
    elif kind == "infinite":
        logits[torch.rand_like(logits) < 0.99] = -torch.inf
    num_keys = torch.randint(1, length + 1, (num_rows,), dtype=torch.int32, device=DEVICE)
    num_keys[0] = length
    behind = torch.arange(length, device=DEVICE) >= num_keys.unsqueeze(1)
    logits[behind] = torch.where(torch.rand_like(logits[behind]) < 0.5, torch.nan, 1e30)
    topk_pos = torch.full((num_rows, k), -7, dtype=torch.int32, device=DEVICE)
    # Slots are positions: of one request, whose pages lie in their order.
    pages = torch.arange(-(-length // 64), dtype=torch.int32, device=DEVICE).unsqueeze(0)
    topk_select_triton.topk_select(logits, num_keys, torch.zeros_like(num_keys), pages, 64, topk_pos)
    order = logits.masked_fill(behind, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    for row, count in enumerate(num_keys.tolist()):
        ranked = order[row]
        wanted = ranked[ranked < count][:k].sort().values
        assert topk_pos[row, : len(wanted)].tolist() == wanted.tolist()
        assert (topk_pos[row, len(wanted) :] == -1).all()
