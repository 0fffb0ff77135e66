"""How near logits must be to the oracle's, and why.

In float32, with the same quantisation in both, engine and oracle compute the same function. What is left are
rounding errors (about 1e-6 of a logit, whose standard deviation is 1), and what rounding errors can set off: a
value in the middle of two e4m3 codes that is rounded the other way, and an index logit so near the K-th that
the selection differs. Those two move a row of logits visibly (up to some tenths), but they are rare. So:

* a share of all rows lies within a tolerance of the oracle: 95 % within 1e-3 for a cache in the model's
  dtype; 90 % within 4e-3 for fp8_ds_mla, where the latent of every key can be rounded the other way, too;
* no row differs by more than 0.5.

Tensor cores that multiply fp8 (SM 89 and 90) keep some 14 bits of a sum, so that index logits differ from exact
ones by up to 2e-4 of the largest, DeepGEMM's as much as ours. Then a key near the threshold is exchanged more
often: of the rows past the top-k, 99.8 % lay within the tolerance with the reference's logits on an H200, 94 % with
the kernel's, and 87 % of those of a single prompt. There the share is 80 %; the mildest of wrong implementations
leaves a quarter.

A bfloat16 model rounds every activation to eight bits, so rows differ by some hundredths and nearly tied
selections flip: there the mean divergence from the oracle is compared, with a mark between that of a right
and of a wrong implementation (right: 2e-4 for either cache, wrong: 1e-3 and more).

test_sabotage.py shows that a wrong implementation misses the marks by far.
"""

import torch

from engine.harness import Completion
from engine.oracle import oracle_logits

ROW_TOLERANCE = {"auto": 1e-3, "fp8": 4e-3}
FP8_TENSOR_CORES = torch.cuda.is_available() and torch.cuda.get_device_capability() in ((8, 9), (9, 0))
SHARE_WITHIN = {"auto": 0.80, "fp8": 0.80} if FP8_TENSOR_CORES else {"auto": 0.95, "fp8": 0.90}
WORST_ROW = 0.5
BFLOAT16_KL = 4e-4


def row_errors(oracle, completions: list[Completion]) -> torch.Tensor:
    """The largest absolute difference in each row of logits, all completions behind one another."""
    errors = []
    for completion in completions:
        logits = completion.logits()
        expected = oracle_logits(oracle, completion.token_ids)[:-1][-len(logits) :]
        errors.append((logits - expected).abs().amax(dim=-1))
    return torch.cat(errors)


def assert_close(oracle, completions: list[Completion], cache: str) -> None:
    errors = row_errors(oracle, completions)
    share = (errors <= ROW_TOLERANCE[cache]).double().mean().item()
    print(f"rows {len(errors)}: median {errors.median():.1e}, worst {errors.max():.1e}, within {share:.3f}")
    assert share >= SHARE_WITHIN[cache]
    assert errors.max() <= WORST_ROW


def kl_divergence(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Of the next-token distributions, ``[T]``, in nats."""
    log_p, log_q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_kl(oracle, completions: list[Completion]) -> float:
    """Mean divergence of the engine's distributions from the oracle's."""
    divergences = [
        kl_divergence(oracle_logits(oracle, completion.token_ids)[:-1], completion.logits())
        for completion in completions
    ]
    return torch.cat(divergences).mean().item()
