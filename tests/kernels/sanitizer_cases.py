"""Small problems that csrc/sanitize.py runs under compute-sanitizer: ``python -m kernels.sanitizer_cases KERNEL``.

Everything but the kernel is done on the CPU, so that it is all that the sanitizer sees.
"""

import sys

import torch

from kernels import index_logits_cases, slot_union_cases, sparse_mla_cuda_cases
from kernels.inputs import cuda_copy
from vllm_dsv32.kernels import (
    cuda_library,
    index_logits,
    index_logits_triton,
    sparse_mla,
    sparse_mla_cuda,
    sparse_mla_cuda_union,
    topk_select,
)


def attend(num_heads, num_valid, num_slots, cache_format="fp8_ds_mla"):
    q, cache, *rest, scale = sparse_mla_cuda_cases.problem(
        num_heads, num_valid, num_slots, 2048, cache_format=cache_format
    )
    got = sparse_mla_cuda.sparse_mla(*map(cuda_copy, (q, cache, *rest)), scale)
    is_rounded = cache_format == "fp8_ds_mla" and num_heads > sparse_mla_cuda.MAX_HEADS
    rows = sparse_mla_cuda_cases.rounded_to_float16(cache) if is_rounded else cache
    wanted = sparse_mla.reference(q.float(), rows, *rest, scale)
    sparse_mla_cuda_cases.assert_near([x.cpu() for x in got], wanted)


def run_sparse_mla():
    attend(16, [0, 1, 63, 64, 65, 129, 512], 512)
    attend(16, [700], 2048)
    attend(8, [300, 2], 320)
    attend(32, [64] * 70, 64)  # more work than blocks


def run_sparse_mla_wide():
    attend(64, [0, 1, 65, 300], 512)
    attend(128, [200], 512)
    attend(100, [130, 64], 192)


def run_sparse_mla_bf16_wide():
    attend(64, [0, 1, 65, 300], 512, "bfloat16")
    attend(128, [200], 512, "bfloat16")
    attend(100, [130, 64] * 70, 192, "bfloat16")  # more work than blocks


def run_sparse_mla_bf16_union():
    counts = [0, 1, 65, 300, 0, 0, 0, 0, 512, 512, 512, 512] + [130, 64, 7, 0] * 254  # more groups than blocks
    attend_unions(counts, 512, 2048, "bfloat16")


def run_sparse_mla_fp8_union():
    counts = [0, 1, 65, 300, 0, 0, 0, 0, 512, 512, 512, 512] + [130, 120, 7, 0] * 254
    attend_unions(counts, 512, 600, "fp8_ds_mla")
    attend_unions(counts, 512, 2048, "fp8_ds_mla")


def attend_unions(counts, num_slots, num_rows, cache_format):
    cuda_library.require()
    q, cache, *rest, scale = sparse_mla_cuda_cases.problem(
        16, counts, num_slots, num_rows, cache_format=cache_format
    )
    rest[0][3, :150] = rest[0][3, 150:300]  # slots that a token has again
    num_whole = sparse_mla_cuda.num_whole_tokens(cuda_copy(q), num_slots)
    got = sparse_mla_cuda_union.sparse_mla(*map(cuda_copy, (q, cache, *rest)), scale)
    slot_union_cases.assert_attended([x.cpu() for x in got], q, cache, *rest, scale, num_whole)


def run_topk_select():
    cuda_library.require()
    k = 2048
    generator = torch.Generator().manual_seed(1)
    for width, cluster_sizes in ((5000, (1, 2)), (20_000, (2, 8))):
        num_keys = torch.tensor([width, 0, 1, k - 1, k, k + 1, width - 1], dtype=torch.int32)
        logits = torch.randn(len(num_keys), width, generator=generator)
        logits[-1] = (logits[-1] * 2).round()
        ids, table = torch.zeros_like(num_keys), torch.zeros(1, 1, dtype=torch.int32)
        wanted = torch.empty(len(num_keys), k, dtype=torch.int32)
        topk_select.reference(logits, num_keys, ids, table, 1 << 30, wanted)
        for size in cluster_sizes:
            out = torch.empty_like(wanted, device="cuda")
            given = map(cuda_copy, (logits, num_keys, ids, table))
            torch.ops.vllm_dsv32.topk_select(*given, 1 << 30, size, out)
            assert torch.equal(out.cpu(), wanted)


def run_index_logits():
    cuda_library.require()
    for name in ("lengths around tiles, steps and blocks", "all kinds", "padding in front, between and behind"):
        arguments = index_logits_cases.problem(index_logits_cases.BATCHES[name], device="cpu")
        q, weights, *rest, num_keys, width = arguments
        got = index_logits_triton.new_logits(len(num_keys), width, torch.device("cuda"))
        torch.ops.vllm_dsv32.index_logits(*map(cuda_copy, arguments[:-1]), got)
        visible = torch.arange(width) < num_keys.unsqueeze(1)
        magnitude = index_logits.reference(q, weights.abs(), *rest, num_keys, width)[visible]
        wanted = index_logits.reference(*arguments)[visible]
        index_logits_cases.assert_near(got.cpu()[visible], wanted, 1e-3 * magnitude)


RUNS = {
    "index_logits": run_index_logits,
    "sparse_mla": run_sparse_mla,
    "sparse_mla_wide": run_sparse_mla_wide,
    "sparse_mla_bf16_wide": run_sparse_mla_bf16_wide,
    "sparse_mla_bf16_union": run_sparse_mla_bf16_union,
    "sparse_mla_fp8_union": run_sparse_mla_fp8_union,
    "topk_select": run_topk_select,
}

if __name__ == "__main__":
    RUNS[sys.argv[1]]()
