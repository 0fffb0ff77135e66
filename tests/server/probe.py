"""A vLLM plugin of the tests: every process of the server notes what it resolved our names to, and used.

It is put on the server's PYTHONPATH as a distribution of its own. Each process writes PROBE_FOLDER/<pid>.json
again and again, because a server's children do not end in an orderly way.
"""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path


def register() -> None:
    threading.Thread(target=_watch, args=(Path(os.environ["PROBE_FOLDER"]),), daemon=True).start()


def _watch(folder: Path) -> None:
    while True:
        # While vLLM is imported, its registries are not there or not complete, and sys.modules changes.
        with contextlib.suppress(AttributeError, KeyError, RuntimeError):
            used = sorted(name for name in list(sys.modules) if name.startswith("vllm_dsv32."))
            note = {"process": _process_title(), "modules": used, "owners": _owners()}
            temporary = folder / f"{os.getpid()}.tmp"
            temporary.write_text(json.dumps(note))
            temporary.replace(folder / f"{os.getpid()}.json")
        time.sleep(0.5)


def _process_title() -> str:
    return Path(f"/proc/{os.getpid()}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def _owners() -> dict[str, str]:
    """The registered "module:class" of each name, without importing it.

    Nor are the registries imported: vLLM does that in another thread, and the two would get in each other's way.
    """
    tokenizers = sys.modules["vllm.tokenizers.registry"].TokenizerRegistry.tokenizers
    renderers = sys.modules["vllm.renderers.registry"].RENDERER_REGISTRY.renderers
    tool_parsers = sys.modules["vllm.tool_parsers"].ToolParserManager
    reasoning_parsers = sys.modules["vllm.reasoning"].ReasoningParserManager
    return {
        "tokenizer": ":".join(tokenizers["deepseek_v32"]),
        "renderer": ":".join(renderers["deepseek_v32"]),
        "tool_parser": _parser(tool_parsers.tool_parsers, tool_parsers.lazy_parsers, "deepseek_v32"),
        "reasoning_parser": _parser(
            reasoning_parsers.reasoning_parsers, reasoning_parsers.lazy_parsers, "deepseek_v3"
        ),
    }


def _parser(eager: dict, lazy: dict, name: str) -> str:
    if name in eager:
        return f"{eager[name].__module__}:{eager[name].__name__}"
    return ":".join(lazy[name])
