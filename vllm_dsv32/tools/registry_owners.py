"""Who answers to a name in vLLM's registries, read without importing the answer."""

from vllm_dsv32.plugin import Registration

__all__ = ["owner"]


def owner(registration: Registration) -> str | None:
    """Return the present owner of a registration's name.

    Args:
        registration: which registry, and which name in it; ``target`` plays no part.

    Returns:
        ``module:Class``, or None if nobody has registered the name.
    """
    return _LOOKUPS[registration.surface](registration.name)


def _spelled(found: type | tuple[str, str] | None) -> str | None:
    """Spell a class, or the pair of a lazy registration, as ``module:Class``."""
    if found is None:
        return None
    if isinstance(found, type):
        return f"{found.__module__}:{found.__qualname__}"
    return ":".join(found)


def _model(name: str) -> str | None:
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

    entry = ModelRegistry.models.get(name)
    if entry is None:
        return None
    if isinstance(entry, _LazyRegisteredModel):
        return _spelled((entry.module_name, entry.class_name))
    return _spelled(entry.load_model_cls())


def _config(name: str) -> str | None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    return _spelled(MODELS_CONFIG_MAP.get(name))


def _tokenizer(name: str) -> str | None:
    from vllm.tokenizers.registry import TokenizerRegistry

    return _spelled(TokenizerRegistry.tokenizers.get(name))


def _renderer(name: str) -> str | None:
    from vllm.renderers.registry import RENDERER_REGISTRY

    return _spelled(RENDERER_REGISTRY.renderers.get(name))


def _tool_parser(name: str) -> str | None:
    from vllm.tool_parsers import ToolParserManager

    # vLLM asks for loaded classes first; a lazy registration under the same name does not replace one.
    return _spelled(ToolParserManager.tool_parsers.get(name) or ToolParserManager.lazy_parsers.get(name))


def _reasoning_parser(name: str) -> str | None:
    from vllm.reasoning import ReasoningParserManager

    found = ReasoningParserManager.reasoning_parsers.get(name)
    return _spelled(found or ReasoningParserManager.lazy_parsers.get(name))


_LOOKUPS = {
    "model": _model,
    "config": _config,
    "tokenizer": _tokenizer,
    "renderer": _renderer,
    "tool_parser": _tool_parser,
    "reasoning_parser": _reasoning_parser,
}
