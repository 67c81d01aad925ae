"""The machine that measured, as far as a figure depends on it: no names of hosts, users or folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine() -> dict[str, str | int]:
    """Processor, cores that may be used, GPU if any, and the versions that figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, str | int] = {"cpu": _processor(), "cores": cores, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        if version := _version(package):
            found[package] = version
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def describe(found: dict[str, str | int]) -> str:
    """One line, such as `AMD EPYC 9B14, 2 cores, torch 2.14.0`."""
    parts = [str(found[key]) for key in ("gpu", "cpu") if key in found]
    if "cores" in found:
        parts.append(f"{found['cores']} core" + ("" if found["cores"] == 1 else "s"))
    parts += [f"{key} {found[key]}" for key in ("torch", "transformers") if key in found]
    return ", ".join(parts)
