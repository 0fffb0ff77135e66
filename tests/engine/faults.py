"""Mistakes that implementations of this model have made, as replacements of kernels.

Each function gives arguments for ``harness.kernels_replaced``.
"""

import torch

from vllm_dsv32.kernels.latent_insert import rms_norm
from vllm_dsv32.kernels.rope import RopeLayout, rope_interleaved
from vllm_dsv32.layout import index_key_views, latent_fp8_views

# Pairs (i, i + 32) as neighbours: rotating interleaved after this reordering rotates halves.
HALVES_AS_PAIRS = torch.arange(64).reshape(2, 32).T.flatten()


def index_rope_interleaved():
    def insert(original):
        def sabotaged(index_k, weight, bias, eps, positions, table, _layout, slots, cache):
            original(index_k, weight, bias, eps, positions, table, RopeLayout.INTERLEAVED, slots, cache)

        return sabotaged

    def query(original):
        return lambda q, weights, positions, table, _layout: original(
            q, weights, positions, table, RopeLayout.INTERLEAVED
        )

    return {"index_insert": insert, "index_query": query}


def mla_rope_as_halves():
    def insert(original):
        return lambda kv_c, k_pe, *rest: original(kv_c, k_pe[:, HALVES_AS_PAIRS], *rest)

    def query(original):
        def sabotaged(q, w_uk_t, positions, table):
            nope, rope = q.split([w_uk_t.shape[1], 64], dim=-1)
            return original(torch.cat((nope, rope[..., HALVES_AS_PAIRS]), dim=-1), w_uk_t, positions, table)

        return sabotaged

    return {"latent_insert": insert, "mla_query": query}


def relu_after_the_sum():
    def logits(_original):
        def sabotaged(q_fp8, weights, cache, block_table, request_ids, num_keys, width):
            views = index_key_views(cache)
            keys = (views.key_fp8.float() * views.key_scale.unsqueeze(-1))[block_table[request_ids].long()]
            keys = keys.flatten(1, 2)[:, :width]
            keys = torch.nn.functional.pad(keys, (0, 0, 0, width - keys.shape[1]))
            scores = torch.relu(torch.einsum("th,thd,tsd->ts", weights, q_fp8.float(), keys))
            return scores.masked_fill(torch.arange(width) >= num_keys.unsqueeze(-1), -torch.inf)

        return sabotaged

    return {"index_logits": logits}


def k_norm_without_bias():
    def insert(original):
        return lambda index_k, weight, bias, *rest: original(index_k, weight, torch.zeros_like(bias), *rest)

    return {"index_insert": insert}


def topk_off_by_one():
    def select(original):
        def sabotaged(logits, num_keys, topk_pos):
            fewer = torch.empty_like(topk_pos[:, 1:])
            original(logits, num_keys, fewer)
            topk_pos[:, :-1] = fewer
            topk_pos[:, -1] = -1

        return sabotaged

    return {"topk_select": select}


def latent_scale_per_row():
    def insert(_original):
        def sabotaged(kv_c, k_pe, weight, eps, positions, table, slots, cache):
            latent = rms_norm(kv_c, weight, eps)
            scale = latent.abs().amax(dim=-1, keepdim=True) / 448
            views, at = latent_fp8_views(cache), (slots // cache.shape[1], slots % cache.shape[1])
            views.nope_fp8.view(torch.uint8)[at] = (latent / scale).to(torch.float8_e4m3fn).view(torch.uint8)
            views.nope_scale[at] = scale.expand(-1, 4)
            views.rope[at] = rope_interleaved(k_pe, table[positions]).bfloat16()

        return sabotaged

    return {"latent_insert": insert}


def index_rotates_only_q():
    def insert(original):
        def sabotaged(index_k, weight, bias, eps, positions, table, *rest):
            still = torch.zeros_like(table)
            still[:, : table.shape[1] // 2] = 1
            original(index_k, weight, bias, eps, positions, still, *rest)

        return sabotaged

    return {"index_insert": insert}


def random_selection():
    def select(original):
        return lambda logits, num_keys, topk_pos: original(torch.rand_like(logits), num_keys, topk_pos)

    return {"topk_select": select}


def stale_topk_buffer():
    """Each layer reads what the one before it selected."""
    selections = []

    def select(original):
        def sabotaged(logits, num_keys, topk_pos):
            selections.append(torch.empty_like(topk_pos))
            original(logits, num_keys, selections[-1])
            stale = selections.pop(0) if len(selections) > 1 else selections[-1]
            # A step of another size has nothing to do with this one.
            topk_pos.copy_(stale if stale.shape == topk_pos.shape else selections[-1])

        return sabotaged

    return {"topk_select": select}


def index_scale_in_nominal_row():
    """Written where the cache's nominal shape suggests it, behind each key; a page has all of them at its end."""

    def insert(original):
        def sabotaged(index_k, weight, bias, eps, positions, table, layout, slots, cache):
            original(index_k, weight, bias, eps, positions, table, layout, slots, cache)
            views, at = index_key_views(cache), (slots // cache.shape[1], slots % cache.shape[1])
            scale = views.key_scale[at].clone()
            views.key_scale[at] = 0
            cache[(*at, slice(128, 132))] = scale.unsqueeze(-1).view(torch.uint8)

        return sabotaged

    return {"index_insert": insert}
