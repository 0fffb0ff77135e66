"""How far two results of the same inputs lie apart."""

import math

import torch

__all__ = [
    "DIFFERENCE_LIMIT",
    "FP8_LATENT_LIMIT",
    "SELECTION_LIMIT",
    "num_wrong_rows",
    "relative_difference",
    "share_of_others",
]

DIFFERENCE_LIMIT = 0.02
"""Of attention and of logits, relative to the largest value: rounding to bfloat16 and fp8 products summed in
fewer bits than float32 has stay well below it, a wrong key or scale does not."""

FP8_LATENT_LIMIT = 0.1
"""Of latents in e4m3, relative to the largest: half a step each of ours, whose scale takes the largest value to 448
(1/28), and of vLLM's, whose scale is a power of two (1/16)."""

SELECTION_LIMIT = 0.02
"""Of what two sides select by scores of their own: queries that are rounded in another order swap keys
whose scores lie next to each other, of which random scores have many."""


def relative_difference(got: torch.Tensor, wanted: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """The largest difference over the largest wanted value; infinite if anything is NaN or infinite."""
    got, wanted = got.float(), wanted.float()
    if where is not None:
        got, wanted = got.masked_fill(~where, 0.0), wanted.masked_fill(~where, 0.0)
    value = float((got - wanted).abs().max() / wanted.abs().max())
    return value if math.isfinite(value) else math.inf


def share_of_others(selected: torch.Tensor, wanted: torch.Tensor) -> float:
    """How much of ``selected`` is not among ``wanted``; rows of different numbers, as many in both."""
    ordered = wanted.sort(1).values
    place = torch.searchsorted(ordered, selected.contiguous()).clamp(max=ordered.shape[1] - 1)
    return float((ordered.gather(1, place) != selected).float().mean())


def num_wrong_rows(logits: torch.Tensor, num_keys: torch.Tensor, topk_pos: torch.Tensor) -> int:
    """Rows whose selection is not a set of the K highest values; of equal values any may be selected."""
    visible = torch.arange(logits.shape[1], device=logits.device) < num_keys.unsqueeze(1)
    ranked = logits.masked_fill(~visible, -torch.inf)
    k = topk_pos.shape[1]
    highest = torch.full(topk_pos.shape, -torch.inf, device=logits.device)
    highest[:, : min(k, logits.shape[1])] = ranked.topk(min(k, logits.shape[1]), dim=1).values
    inside = (topk_pos >= 0) & (topk_pos < num_keys.unsqueeze(1))
    values = ranked.gather(1, topk_pos.clamp(0, logits.shape[1] - 1).long()).masked_fill(~inside, -torch.inf)
    ordered = topk_pos.sort(1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    wrong = (values.sort(1, descending=True).values != highest).any(1) | repeated
    wrong |= (~inside & (topk_pos != -1)).any(1) | (inside.sum(1) != num_keys.clamp(max=k))
    return int(wrong.sum())
