"""The rows of each line: both sides on the same inputs, compared first and then timed."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from triton.errors import TritonError

from kernel_table import decode_block as decode_block_of
from kernel_table import peers
from kernel_table.agreement import (
    DIFFERENCE_LIMIT,
    FP8_LATENT_LIMIT,
    SELECTION_LIMIT,
    num_wrong_rows,
    relative_difference,
    share_of_others,
)
from kernel_table.decode_block import BlockProblem
from kernel_table.problems import (
    BLOCK_SIZE,
    TOPK,
    IndexProblem,
    SparseProblem,
    index_keys,
    index_problem,
    latent_caches,
)
from kernel_table.table import Row
from kernel_table.timing import copy_bandwidth, launches, microseconds
from vllm_dsv32.kernels import index_logits, sparse_mla
from vllm_dsv32.kernels.dispatch import KernelSet, Problem, select_kernels
from vllm_dsv32.kernels.selection import select
from vllm_dsv32.layout import FP8_DS_MLA, INDEX_KEY_NBYTES, LATENT_FP8_NBYTES, is_fp8_ds_mla

__all__ = [
    "FAILURES",
    "decode_block",
    "index_decode",
    "index_prefill",
    "our_kernels",
    "problem",
    "select_decode",
    "sparse_decode",
    "sparse_prefill",
]

FAILURES = (RuntimeError, TritonError)
"""What a launch raises that cannot be done."""

SCALE = 0.04
PREFILL_ROWS = 4096
VLLM_LOGITS_NBYTES = 512 << 20
"""vLLM's default of VLLM_SPARSE_INDEXER_MAX_LOGITS_MB."""

_CHECKED_ROWS = 256
_REFERENCE_ROWS = 8
_MAX_INPUTS = 200
_PROFILED = 5
_INDEX_BLOCKS = 1 << 17
_LATENT_BLOCKS = 1 << 14

Call = Callable[[], object]
Contestants = dict[str, Sequence[Call]]


def problem(cache_format: str = "auto", num_heads: int = 16) -> Problem:
    """What our dispatch table is asked."""
    return Problem(
        device_type="cuda",
        capability=torch.cuda.get_device_capability(),
        dtype=torch.bfloat16,
        cache_format=cache_format,
        num_heads=num_heads,
        kv_lora_rank=512,
        rope_dim=64,
        num_index_heads=64,
        index_head_dim=128,
        topk=TOPK,
    )


def our_kernels(cache_format: str = "auto", num_heads: int = 16) -> KernelSet:
    """Those that a user gets without asking for any."""
    return select_kernels(problem(cache_format, num_heads))


@functools.cache
def _latent_caches() -> dict[str, torch.Tensor]:
    return latent_caches(_LATENT_BLOCKS)


@functools.cache
def _index_keys() -> torch.Tensor:
    return index_keys(_INDEX_BLOCKS)


def _num_inputs(nbytes: int) -> int:
    """So many inputs that a call finds nothing of its own in the L2 cache."""
    l2_nbytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(_MAX_INPUTS, -(-2 * l2_nbytes // nbytes)))


def _floor_us(nbytes: int) -> float:
    """Of keys in fp8, whose bytes are the least that any contestant reads."""
    return nbytes / copy_bandwidth()


# Sparse attention.


def sparse_decode(num_heads: int, batch: int) -> Row:
    """Random rows of a cache that is far larger than L2."""
    caches = _latent_caches()
    num_slots = _LATENT_BLOCKS * BLOCK_SIZE
    nbytes = batch * TOPK * LATENT_FP8_NBYTES
    inputs = [SparseProblem.random(batch, num_heads, num_slots) for _ in range(_num_inputs(nbytes))]
    schemes = {
        f"{peers.FLASH_ATTN3} bf16": ("auto", peers.flash_attn3),
        f"{peers.FLASH_MLA} fp8": (FP8_DS_MLA, functools.partial(peers.flash_mla, one_request=False)),
    }
    return _sparse(Row(f"B={batch}", floor_us=_floor_us(nbytes)), inputs, caches, schemes)


def sparse_prefill(num_heads: int, num_keys: int, overlap: float = 0.0) -> Row:
    """Random rows of one request's keys, which L2 holds in whole or in part; neighbours share some of them."""
    caches = {name: cache[: num_keys // BLOCK_SIZE] for name, cache in _latent_caches().items()}
    inputs = [SparseProblem.random(PREFILL_ROWS, num_heads, num_keys, overlap)]
    schemes = {
        f"{peers.FLASH_MLA} prefill bf16": ("auto", peers.flash_mla_prefill),
        f"{peers.FLASH_MLA} decode fp8": (FP8_DS_MLA, functools.partial(peers.flash_mla, one_request=True)),
        f"{peers.FLASH_ATTN3} bf16": ("auto", peers.flash_attn3),
    }
    point = f"{PREFILL_ROWS} x {num_keys // 1024}K"
    return _sparse(Row(f"{point}, {overlap} shared" if overlap else point), inputs, caches, schemes)


Scheme = tuple[str, Callable[[SparseProblem, torch.Tensor, float], Callable[[], torch.Tensor]]]
"""The cache format that a peer reads, and how its call is made."""


def _sparse(
    row: Row, inputs: list[SparseProblem], caches: Mapping[str, torch.Tensor], schemes: Mapping[str, Scheme]
) -> Row:
    num_heads = inputs[0].q.shape[1]
    refusals = peers.refusals(problem(num_heads=num_heads))
    ours: Contestants = {}
    first: dict[str, torch.Tensor] = {}
    for cache_format, cache in caches.items():
        kernels = our_kernels(cache_format, num_heads)
        name = f"{kernels.names['sparse_mla']} {'bf16' if cache_format == 'auto' else 'fp8'}"
        ours[name] = [_attention(kernels, x, cache) for x in inputs]
        first[cache_format] = ours[name][0]()
        _compare_with_reference(row, name, inputs[0], cache, first[cache_format])
    others: Contestants = {}
    for name, (cache_format, make) in schemes.items():
        refusal = refusals.get(name.partition(" ")[0])
        if refusal is not None:
            row.skipped[name] = refusal
            continue
        try:
            calls = [make(x, caches[cache_format], SCALE) for x in inputs]
            difference = relative_difference(first[cache_format], calls[0]())
        except FAILURES as error:
            row.skipped[name] = _one_line(error)
            continue
        others[name] = calls
        _judge(row, f"vs {name}", difference)
    _time(row, ours, others)
    return row


def _attention(kernels: KernelSet, x: SparseProblem, cache: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: kernels.sparse_mla(x.q, cache, x.slots, x.num_valid, SCALE)[0]


def _compare_with_reference(row: Row, name: str, x: SparseProblem, cache: torch.Tensor, out: torch.Tensor) -> None:
    rows = slice(-_REFERENCE_ROWS, None)
    wanted, _ = sparse_mla.reference(x.q[rows], cache, x.slots[rows], x.num_valid[rows], SCALE)
    _judge(row, f"{name} vs reference", relative_difference(out[rows], wanted))


# The indexer: logits, top-k, and the slots of what was selected.


def index_decode(batch: int, length: int) -> Row:
    """Requests of one row each, whose keys lie in pages at random places."""
    nbytes = batch * length * INDEX_KEY_NBYTES
    row = Row(f"B={batch} x {length // 1024}K", floor_us=_floor_us(nbytes))
    num_inputs = _num_inputs(nbytes)
    inputs = [index_problem(batch, 1, length, _INDEX_BLOCKS) for _ in range(num_inputs)]
    return _index(row, inputs, peers.deep_gemm_paged, _decode_topk_ops(batch), batch)


def index_prefill(length: int) -> Row:
    """The last rows of one request."""
    row = Row(f"{PREFILL_ROWS} x {length // 1024}K")
    inputs = [index_problem(1, PREFILL_ROWS, length, _INDEX_BLOCKS)]
    begins = torch.zeros_like(inputs[0].num_keys)

    def per_row(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> None:
        peers.top_k_per_row_prefill(logits, begins[: len(logits)], num_keys, topk_pos)

    step = VLLM_LOGITS_NBYTES // (4 * length)
    return _index(row, inputs, peers.deep_gemm_prefill, {"top_k_per_row_prefill": per_row}, step)


TopkOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Of a peer: writes the positions of the highest logits."""
TopkSelect = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor], None]
"""The operation ``topk_select``: writes slots."""


def _index(
    row: Row,
    inputs: list[IndexProblem],
    make_logits: Callable[[IndexProblem, torch.Tensor], peers.Logits],
    topk_ops: Mapping[str, TopkOp],
    peer_step: int,
) -> Row:
    cache = _index_keys()
    kernels = our_kernels()
    name = "+".join(sorted({kernels.names["index_logits"], kernels.names["topk_select"]}))
    ours = {name: [_our_selection(kernels, x, cache) for x in inputs]}
    others: Contestants = {}

    x = inputs[0]
    num_rows = len(x.num_keys)
    checked = slice(max(0, num_rows - _CHECKED_ROWS), num_rows)
    num_keys = x.num_keys[checked]
    logits = _our_logits(kernels, x, cache)(checked)
    _compare_logits_with_reference(row, x, cache, logits)
    wrong = _num_wrong_selections(kernels.topk_select, logits, num_keys)
    if wrong:
        row.wrong.append(f"top-k of {name}: {wrong} of {len(logits)} rows are not the highest {TOPK}")

    refusal = peers.refusals(problem()).get(peers.DEEP_GEMM)
    if refusal is not None:
        row.skipped[peers.DEEP_GEMM] = refusal
    else:
        try:
            peer_logits = [make_logits(x, cache) for x in inputs]
            visible = torch.arange(x.max_num_keys, device=logits.device) < num_keys.unsqueeze(1)
            _judge(row, "logits", relative_difference(logits, peer_logits[0](checked), visible))
            for op_name, op in topk_ops.items():
                calls = [_selection(p, op, x, peer_step) for p, x in zip(peer_logits, inputs, strict=True)]
                _enter(row, others, f"{peers.DEEP_GEMM} + {op_name}", calls, op, logits, num_keys)
        except FAILURES as error:
            row.skipped[peers.DEEP_GEMM] = _one_line(error)
    del logits
    _time(row, ours, others)
    return row


def _enter(
    row: Row,
    others: Contestants,
    name: str,
    calls: Sequence[Call],
    op: TopkOp,
    logits: torch.Tensor,
    num_keys: torch.Tensor,
) -> None:
    """Let a peer's top-k compete if it is right on our logits."""
    try:
        wrong = _num_wrong_selections(_then_slots(op), logits, num_keys)
        calls[0]()
        torch.cuda.synchronize()
    except FAILURES as error:
        row.skipped[name] = _one_line(error)
        return
    if wrong:
        row.skipped[name] = f"{wrong} of {len(logits)} rows are not the highest {TOPK}"
    else:
        others[name] = calls


def _our_logits(kernels: KernelSet, x: IndexProblem, cache: torch.Tensor) -> peers.Logits:
    return lambda rows: kernels.index_logits(
        x.q_fp8[rows],
        x.weights[rows],
        cache,
        x.block_table,
        x.request_ids[rows],
        x.num_keys[rows],
        x.max_num_keys,
    )


def _our_selection(kernels: KernelSet, x: IndexProblem, cache: torch.Tensor) -> Call:
    """As a layer does it; every row is scored."""
    topk_slot = torch.full((len(x.num_keys), TOPK), -1, dtype=torch.int32, device="cuda")

    def call() -> torch.Tensor:
        select(
            kernels,
            x.q_fp8,
            x.weights,
            cache,
            x.block_table,
            x.request_ids,
            x.num_keys,
            x.num_keys,
            x.max_num_keys,
            x.block_table,
            BLOCK_SIZE,
            topk_slot,
        )
        return topk_slot

    return call


def _selection(logits: peers.Logits, topk: TopkOp, x: IndexProblem, step: int) -> Call:
    """Logits of so many rows at a time, and the top-k of them; then the slots of all, as vLLM's layers do it."""
    num_rows = len(x.num_keys)
    topk_pos = torch.full((num_rows, TOPK), -1, dtype=torch.int32, device="cuda")
    ends = [*range(0, num_rows, step), num_rows]
    chunks = [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def call() -> torch.Tensor:
        for rows in chunks:
            topk(logits(rows), x.num_keys[rows], topk_pos[rows])
        return peers.slots_of(topk_pos, x.request_ids, x.block_table)

    return call


def _compare_logits_with_reference(row: Row, x: IndexProblem, cache: torch.Tensor, logits: torch.Tensor) -> None:
    rows = slice(-_REFERENCE_ROWS, None)
    num_keys = x.num_keys[rows]
    wanted = index_logits.reference(
        x.q_fp8[rows], x.weights[rows], cache, x.block_table, x.request_ids[rows], num_keys, x.max_num_keys
    )
    visible = torch.arange(x.max_num_keys, device=logits.device) < num_keys.unsqueeze(1)
    _judge(row, "logits vs reference", relative_difference(logits[rows], wanted, visible))


def _then_slots(topk: TopkOp) -> TopkSelect:
    """A peer's top-k behind the contract of our operation."""

    def select_slots(
        logits: torch.Tensor,
        num_keys: torch.Tensor,
        request_ids: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        topk_slot: torch.Tensor,
    ) -> None:
        assert block_size == BLOCK_SIZE
        topk_pos = torch.full_like(topk_slot, -1)
        topk(logits, num_keys, topk_pos)
        topk_slot.copy_(peers.slots_of(topk_pos, request_ids, block_table))

    return select_slots


def _num_wrong_selections(topk: TopkSelect, logits: torch.Tensor, num_keys: torch.Tensor) -> int:
    """With the pages of one request in their order, so that slots are positions."""
    num_rows, length = logits.shape
    request_ids = torch.zeros_like(num_keys)
    block_table = torch.arange(-(-length // BLOCK_SIZE), dtype=torch.int32, device=logits.device).unsqueeze(0)
    topk_slot = torch.full((num_rows, TOPK), -7, dtype=torch.int32, device=logits.device)
    topk(logits, num_keys, request_ids, block_table, BLOCK_SIZE, topk_slot)
    return num_wrong_rows(logits, num_keys, topk_slot)


# Selection alone, and the whole between a decode step's projections.


def select_decode(batch: int, length: int, random: bool = True) -> Row:
    """From logits to slots. Those that are not random are equal, as they are of a model without weights."""
    row = Row(f"B={batch} x {length // 1024}K")
    kernels = our_kernels()
    name = kernels.names["topk_select"]
    problems = [index_problem(batch, 1, length, _INDEX_BLOCKS) for _ in range(_num_inputs(batch * length * 4))]
    make_logits = torch.randn if random else torch.zeros
    logits = [make_logits(batch, length, device="cuda") for _ in problems]
    topk_slot = torch.empty(batch, TOPK, dtype=torch.int32, device="cuda")

    def calls(select_slots: TopkSelect) -> list[Call]:
        return [
            functools.partial(select_slots, x, p.num_keys, p.request_ids, p.block_table, BLOCK_SIZE, topk_slot)
            for x, p in zip(logits, problems, strict=True)
        ]

    num_keys = problems[0].num_keys
    wrong = _num_wrong_selections(kernels.topk_select, logits[0], num_keys)
    if wrong:
        row.wrong.append(f"top-k of {name}: {wrong} of {batch} rows are not the highest {TOPK}")
    others: Contestants = {}
    refusal = peers.refusals(problem()).get(peers.DEEP_GEMM)
    if refusal is not None:
        row.skipped["vLLM's top-k"] = refusal
    else:
        for op_name, op in _decode_topk_ops(batch).items():
            _enter(row, others, op_name, calls(_then_slots(op)), op, logits[0], num_keys)
    _time(row, {name: calls(kernels.topk_select)}, others)
    return row


def decode_block(num_heads: int, batch: int, length: int) -> Row:
    """One token of each request, from behind its projections to its attention's result."""
    nbytes = batch * (length * INDEX_KEY_NBYTES + TOPK * LATENT_FP8_NBYTES)
    row = Row(f"B={batch} x {length // 1024}K", floor_us=_floor_us(nbytes))
    caches, index_cache = _latent_caches(), _index_keys()
    num_inputs = _num_inputs(nbytes)
    inputs = [BlockProblem.random(batch, num_heads, length, _LATENT_BLOCKS) for _ in range(num_inputs)]
    refusals = peers.refusals(problem(num_heads=num_heads))
    refusal = refusals.get(peers.DEEP_GEMM)
    ours: Contestants = {}
    others: Contestants = {}
    for cache_format, peer in (("auto", peers.FLASH_ATTN3), (FP8_DS_MLA, peers.FLASH_MLA)):
        cache, kind = caches[cache_format], "bf16" if cache_format == "auto" else "fp8"
        kernels = our_kernels(cache_format, num_heads)
        blocks = [decode_block_of.ours(kernels, x, cache, index_cache, SCALE) for x in inputs]
        ours[f"{kernels.names['sparse_mla']} {kind}"] = blocks
        reason = refusal or refusals.get(peer)
        if reason is not None:
            row.skipped[f"{peer} {kind}"] = reason
            continue
        for op_name, op in _decode_topk_ops(batch).items():
            name = f"{peer} {kind}, {op_name}"
            try:
                calls = [decode_block_of.in_tree(x, cache, index_cache, cache_format, op, SCALE) for x in inputs]
                _compare_blocks(row, name, kernels, inputs[0], cache, index_cache, blocks[0](), calls[0])
            except FAILURES as error:
                row.skipped[name] = _one_line(error)
                continue
            others[name] = calls
    row.launches = {name: launches(calls[:_PROFILED]) for name, calls in {**ours, **others}.items()}
    _time(row, ours, others)
    return row


def _compare_blocks(
    row: Row,
    name: str,
    kernels: KernelSet,
    x: BlockProblem,
    cache: torch.Tensor,
    index_cache: torch.Tensor,
    mine: decode_block_of.Attended,
    in_tree: Callable[[], decode_block_of.Attended],
) -> None:
    """What is written, what is selected, and attention over what the peer has written and selected.

    Random values cancel, so that a few other keys, or one that is quantised otherwise, change much of a result.
    """
    written = decode_block_of.latents_at(cache, x.slots)
    mla_q = decode_block_of.prepare(kernels, x, cache, index_cache)()[0]
    theirs = in_tree()
    limit = FP8_LATENT_LIMIT if is_fp8_ds_mla(cache) else DIFFERENCE_LIMIT
    _judge(
        row, f"latents vs {name}", relative_difference(written, decode_block_of.latents_at(cache, x.slots)), limit
    )
    _judge(row, f"selection vs {name}", share_of_others(mine.slots, theirs.slots), SELECTION_LIMIT)
    num_selected = x.index.num_keys.clamp(max=TOPK)
    out, _ = kernels.sparse_mla(mla_q, cache, theirs.slots, num_selected, SCALE)
    _judge(row, f"attention vs {name}", relative_difference(out, theirs.out))


def _decode_topk_ops(batch: int) -> dict[str, TopkOp]:
    return {name: op for name, op in peers.TOPK_OPS.items() if batch <= 64 or name != "cooperative_topk"}


# All.


def _judge(row: Row, name: str, difference: float, limit: float = DIFFERENCE_LIMIT) -> None:
    row.differences[name] = difference
    if difference > limit:
        row.wrong.append(f"{name}: difference {difference:.3g}, at most {limit} is right")


def _time(row: Row, ours: Contestants, others: Contestants) -> None:
    try:
        times = microseconds({**ours, **others})
    except FAILURES as error:
        if not others:
            raise
        # That a peer cannot be captured is no reason to have no time of ours.
        row.skipped |= dict.fromkeys(others, _one_line(error))
        others = {}
        times = microseconds(ours)
    row.ours = {name: times[name] for name in ours}
    row.peers = {name: times[name] for name in others}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
