"""The multi-token-prediction layer of DeepSeek-V3.2 as vLLM's draft model."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from vllm_dsv32.config import ModelDims
from vllm_dsv32.errors import ConfigError
from vllm_dsv32.model.deepseek_v32 import Dsv32DecoderLayer, Dsv32MoEModel, make_topk_indices_buffer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["Dsv32MTP"]


class SharedHead(torch.nn.Module):
    """Norm and output head; the checkpoint's copies of the main model's."""

    def __init__(self, vllm_config: "VllmConfig", prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.head",
        )


class MTPLayer(torch.nn.Module):
    """Joins a token's embedding with the hidden state before it, and runs one decoder layer on both."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        dims: ModelDims,
        topk_indices_buffer: torch.Tensor,
        prefix: str,
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(vllm_config, f"{prefix}.shared_head")
        self.mtp_block = Dsv32DecoderLayer(vllm_config, dims, topk_indices_buffer, prefix)

    def forward(
        self, positions: torch.Tensor, inputs_embeds: torch.Tensor, previous_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """``[T]``, ``[T, hidden]`` and ``[T, hidden]`` to the normalised ``[T, hidden]``."""
        # Position 0 has no hidden state before it; training masked its embedding.
        inputs_embeds = inputs_embeds.masked_fill(positions.unsqueeze(-1) == 0, 0.0)
        joined = torch.cat((self.enorm(inputs_embeds), self.hnorm(previous_hidden_states)), dim=-1)
        hidden_states, residual = self.mtp_block(positions, self.eh_proj(joined), None)
        hidden_states, _ = self.shared_head.norm(hidden_states, residual)
        return hidden_states


class MTPModel(torch.nn.Module):
    """The draft layers, numbered on from the main model's."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        dims = ModelDims.from_hf_config(config)
        # vLLM replaces it by the target's.
        self.topk_indices_buffer = make_topk_indices_buffer(vllm_config, dims)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.first_layer = config.num_hidden_layers
        self.layers = torch.nn.ModuleDict(
            {
                str(index): MTPLayer(vllm_config, dims, self.topk_indices_buffer, f"{prefix}.layers.{index}")
                for index in range(self.first_layer, self.first_layer + config.num_nextn_predict_layers)
            }
        )

    def layer(self, spec_step_idx: int) -> MTPLayer:
        """The layer of a draft step; steps past the last layer start over."""
        layer = self.layers[str(self.first_layer + spec_step_idx % len(self.layers))]
        assert isinstance(layer, MTPLayer)
        return layer


class Dsv32MTP(Dsv32MoEModel):
    """The draft model, as vLLM's proposer runs it."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        """Build the draft model.

        Raises:
            ConfigError: the checkpoint has no draft layer.
        """
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        if not getattr(self.config, "num_nextn_predict_layers", 0):
            raise ConfigError(
                "config.json: num_nextn_predict_layers is 0 or absent, so there is no layer to draft with. "
                "Drop --speculative-config."
            )
        self.quant_config = vllm_config.quant_config
        self.model = MTPModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self._init_hooks(vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[T]`` to ``[T, hidden]``."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step.

        Args:
            input_ids: ``[T]``, the tokens after those of ``hidden_states``.
            positions: ``[T]``.
            hidden_states: ``[T, hidden]``, of the main model or of the step before.
            intermediate_tensors: not used; a draft model is not split into stages.
            inputs_embeds: ``[T, hidden]``, instead of ``input_ids``.
            spec_step_idx: number of the draft step.

        Returns:
            The states that give logits and those that the next step continues from: the same, after the
            layer's final norm.
        """
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        hidden_states = self.model.layer(spec_step_idx)(positions, inputs_embeds, hidden_states)
        return hidden_states, hidden_states

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor | None:
        """``[T, hidden]``, already normalised, to ``[T, vocabulary]``."""
        return self.logits_processor(self.model.layer(spec_step_idx).shared_head.head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the draft layers; see :mod:`vllm_dsv32.model.weights`.

        Raises:
            CheckpointError: a tensor of theirs is missing, unexpected or misshapen.
        """
        first, *others = map(int, self.model.layers)
        # Each layer repeats the model's own embedding; one is kept.
        repeated = {f"model.layers.{layer}.embed_tokens.weight" for layer in others}
        return self._load(
            ((name, tensor) for name, tensor in weights if name not in repeated),
            checkpoint_name=self._checkpoint_name,
            belongs_here=lambda layer: layer is not None and layer >= first,
        )

    def _checkpoint_name(self, parameter: str) -> str:
        """The checkpoint keeps the decoder layer's tensors and the embedding beside the draft's own."""
        if parameter.startswith("model.embed_tokens."):
            return parameter.replace("model.", f"model.layers.{self.model.first_layer}.", 1)
        return re.sub(r"(model\.layers\.\d+\.)mtp_block\.", r"\1", parameter)
