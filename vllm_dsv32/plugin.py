"""The entry point: a table of strings, and nothing heavy.

vLLM calls :func:`register` in every process, also in those that serve another model, and before it has
decided how graphs are captured. So everything here is a name; model code is imported when it is needed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dsv32 import compat

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

__all__ = ["REGISTRATIONS", "REGISTRATIONS_IF_UNSUPPORTED", "Registration", "register"]


@dataclass(frozen=True)
class Registration:
    """One name of vLLM's and the class that answers to it."""

    surface: str
    """"model", "config", "tokenizer", "renderer", "tool_parser" or "reasoning_parser"."""
    name: str
    target: str
    """``module:Class``."""

    @property
    def module(self) -> str:
        """The part before the colon."""
        return self.target.partition(":")[0]

    @property
    def class_name(self) -> str:
        """The part after the colon."""
        return self.target.partition(":")[2]


# Models are registered by package, not by module: vLLM caches what it learns of a class by the hash of
# the file that the name points to, or of all files if it is a package.
REGISTRATIONS = (
    Registration("model", "DeepseekV32ForCausalLM", "vllm_dsv32.model:Dsv32ForCausalLM"),
    Registration("model", "DeepseekV32MTPModel", "vllm_dsv32.model:Dsv32MTP"),
    Registration("config", "DeepseekV32ForCausalLM", "vllm_dsv32.plugin:Dsv32ConfigHook"),
    Registration("config", "DeepseekV32MTPModel", "vllm_dsv32.plugin:Dsv32ConfigHook"),
    Registration("tokenizer", "deepseek_v32", "vllm_dsv32.serving.tokenizer:Dsv32Tokenizer"),
    Registration("renderer", "deepseek_v32", "vllm_dsv32.serving.renderer:Dsv32Renderer"),
    Registration("tool_parser", "deepseek_v32", "vllm_dsv32.serving.tool_parser:Dsv32ToolParser"),
    Registration("reasoning_parser", "deepseek_v3", "vllm_dsv32.serving.reasoning_parser:Dsv32ReasoningParser"),
)

# Outside the tested range the two architectures must not fall through to vLLM's own classes.
REGISTRATIONS_IF_UNSUPPORTED = (
    Registration("model", "DeepseekV32ForCausalLM", "vllm_dsv32.refusal:RefusedModel"),
    Registration("model", "DeepseekV32MTPModel", "vllm_dsv32.refusal:RefusedModel"),
)


class Dsv32ConfigHook:
    """What vLLM runs on the configuration of a V3.2 engine before it builds a layer."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check the settings, fix the KV-cache dtype, and change what would make the start long.

        See :func:`vllm_dsv32.config.verify_vllm_config` and :func:`vllm_dsv32.startup.shorten_startup`.
        """
        from vllm_dsv32.config import verify_vllm_config
        from vllm_dsv32.startup import shorten_startup

        verify_vllm_config(vllm_config)
        shorten_startup(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Complete the checkpoint's configuration; see :func:`vllm_dsv32.config.fill_defaults`."""
        from vllm_dsv32.config import fill_defaults

        fill_defaults(model_config.hf_config)


def register() -> None:
    """Put the plugin's names into vLLM's registries. Called by vLLM, once a process."""
    from vllm.logger import init_logger

    # vLLM formats the loggers below "vllm" only.
    logger = init_logger("vllm.plugins.dsv32")
    reason = compat.unsupported_reason()
    if reason is not None:
        logger.error(reason)
    for registration in REGISTRATIONS if reason is None else REGISTRATIONS_IF_UNSUPPORTED:
        _REGISTER[registration.surface](registration)


def _register_model(registration: Registration) -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    ModelRegistry.register_model(registration.name, registration.target)


def _register_config(registration: Registration) -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    # vLLM has no function for it; the map is what it looks the hook up in.
    MODELS_CONFIG_MAP[registration.name] = Dsv32ConfigHook


def _register_tokenizer(registration: Registration) -> None:
    from vllm.tokenizers.registry import TokenizerRegistry

    # register() would warn, in every process and also under other models, that it overwrites a name.
    TokenizerRegistry.tokenizers[registration.name] = (registration.module, registration.class_name)


def _register_renderer(registration: Registration) -> None:
    from vllm.renderers.registry import RENDERER_REGISTRY

    RENDERER_REGISTRY.renderers[registration.name] = (registration.module, registration.class_name)


def _register_tool_parser(registration: Registration) -> None:
    from vllm.tool_parsers import ToolParserManager

    ToolParserManager.register_lazy_module(registration.name, registration.module, registration.class_name)


def _register_reasoning_parser(registration: Registration) -> None:
    from vllm.reasoning import ReasoningParserManager

    ReasoningParserManager.register_lazy_module(registration.name, registration.module, registration.class_name)


_REGISTER = {
    "model": _register_model,
    "config": _register_config,
    "tokenizer": _register_tokenizer,
    "renderer": _register_renderer,
    "tool_parser": _register_tool_parser,
    "reasoning_parser": _register_reasoning_parser,
}
