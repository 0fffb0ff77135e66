"""Operation ``mla_output`` by cuBLAS, which reads and writes the strided views where they lie."""

import torch

__all__ = ["mla_output"]


def mla_output(latent: torch.Tensor, w_uv: torch.Tensor, output: torch.Tensor) -> None:
    """One batched product, written straight into ``output``: there is nothing left for a kernel to fuse."""
    num_heads, _, v_dim = w_uv.shape
    torch.bmm(latent.transpose(0, 1), w_uv, out=output.unflatten(1, (num_heads, v_dim)).transpose(0, 1))
