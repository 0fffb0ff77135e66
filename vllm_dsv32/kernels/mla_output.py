"""Operation ``mla_output``: from attended latents to the heads' values."""

import torch

__all__ = ["reference"]


def reference(latent: torch.Tensor, w_uv: torch.Tensor, output: torch.Tensor) -> None:
    """``output[t, n] = latent[t, n] W_UV[n]``, multiplied in float32 and rounded once.

    Args:
        latent: ``[T, N, 512]``, the output of ``sparse_mla``.
        w_uv: ``[N, 512, v]``.
        output: ``[T, N * v]``, overwritten.
    """
    # CPUs without bfloat16 units multiply in bfloat16 many times slower than in float32.
    values = torch.bmm(latent.transpose(0, 1).float(), w_uv.float()).transpose(0, 1)
    output.copy_(values.flatten(1))
