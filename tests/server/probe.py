"""A vLLM plugin of the tests: every process of the server notes what it resolved our names to, and used.

It is put on the server's PYTHONPATH as a distribution of its own. Each process writes PROBE_FOLDER/<pid>.json
again and again, because a server's children do not end in an orderly way.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

SURFACES = ("tokenizer", "renderer", "tool_parser", "reasoning_parser")


def register() -> None:
    threading.Thread(target=_watch, args=(Path(os.environ["PROBE_FOLDER"]),), daemon=True).start()


def _watch(folder: Path) -> None:
    while True:
        used = sorted(name for name in list(sys.modules) if name.startswith("vllm_dsv32."))
        note = {"process": _process_title(), "modules": used, "owners": _owners()}
        temporary = folder / f"{os.getpid()}.tmp"
        temporary.write_text(json.dumps(note))
        temporary.replace(folder / f"{os.getpid()}.json")
        time.sleep(0.5)


def _process_title() -> str:
    return Path(f"/proc/{os.getpid()}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def _owners() -> dict[str, str]:
    """The registered "module:class" of each name, without importing it."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.tool_parsers import ToolParserManager

    return {
        "tokenizer": ":".join(TokenizerRegistry.tokenizers["deepseek_v32"]),
        "renderer": ":".join(RENDERER_REGISTRY.renderers["deepseek_v32"]),
        "tool_parser": _parser(ToolParserManager.tool_parsers, ToolParserManager.lazy_parsers, "deepseek_v32"),
        "reasoning_parser": _parser(
            ReasoningParserManager.reasoning_parsers, ReasoningParserManager.lazy_parsers, "deepseek_v3"
        ),
    }


def _parser(eager: dict, lazy: dict, name: str) -> str:
    if name in eager:
        return f"{eager[name].__module__}:{eager[name].__name__}"
    return ":".join(lazy[name])
