"""What this machine can do with the product, what it cannot, and why not. Looks only; loads no model and no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hub.base import describe_base, embedded_bases, find_base
from hub.connect import URL_VARIABLE, open_remote
from hub.errors import HubError
from hub.registry import LocalHub
from hub.tables import size

REMOTE_PATIENCE_S = 2.0
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
NEEDS: Mapping[str, Sequence[str]] = {
    "serve": ("torch", "transformers", "safetensors", "fastapi", "uvicorn", "prometheus_client"),
    "train": ("torch", "transformers", "safetensors", "accelerate", "datasets", "peft", "trl"),
}
SHOWN_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "bitsandbytes",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, whether it is good (None: neither), and what was found."""

    topic: str
    good: bool | None
    found: str


def examine(home: Path) -> list[Finding]:
    """Everything that decides what will work here, the hub's own home first."""
    return [
        _home(home),
        *_remote(),
        *_bases(),
        Finding("push, pull, browse", True, "yes: need nothing more"),
        *(_ability(command, packages) for command, packages in NEEDS.items()),
        Finding("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("cpu", None, _cpu()),
        Finding("memory", None, _memory()),
        _cuda(),
        Finding("packages", None, _packages()),
    ]


def _home(home: Path) -> Finding:
    if not home.exists():
        parent = next(folder for folder in home.absolute().parents if folder.exists())
        writable = os.access(parent, os.W_OK)
        return Finding("hub home", writable, f"{home}: {'made at first use' if writable else 'cannot be made'}")
    try:
        hub = LocalHub(home)
        adapters = hub.adapters()
    except HubError as error:
        return Finding("hub home", False, str(error))
    versions = sum(len(adapter.versions) for adapter in adapters)
    free = size(shutil.disk_usage(home).free)
    if not os.access(home, os.W_OK):
        return Finding("hub home", False, f"{home} cannot be written")
    return Finding("hub home", True, f"{home}: adapters {len(adapters)}, versions {versions}, {free} free on the disk")


def _remote() -> list[Finding]:
    """The hub that HUB_URL names, if it names one."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return []
    try:
        asking = open_remote(url, patience_s=REMOTE_PATIENCE_S).whoami()
    except HubError as error:
        return [Finding("remote hub", False, str(error))]
    return [Finding("remote hub", True, f"{url} knows you as {asking.name}: {', '.join(sorted(asking.scopes))}")]


def _bases() -> list[Finding]:
    names = embedded_bases()
    if not names:
        return [Finding("embedded bases", None, "none; name a folder or a Hugging Face id with --base")]
    return [_base(name) for name in names]


def _base(name: str) -> Finding:
    try:
        base = describe_base(find_base(name), name=name)
    except HubError as error:
        return Finding(f"base {name}", False, str(error))
    shape = f"{base.model_type}, {base.layers} layers, hidden {base.hidden_size}, vocabulary {base.vocab_size}"
    return Finding(f"base {name}", True, shape)


def _ability(command: str, packages: Sequence[str]) -> Finding:
    missing = [package for package in packages if _version(package) is None]
    if not missing:
        return Finding(f"hub {command}", True, "yes")
    reason = f"no, because {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    return Finding(f"hub {command}", False, f"{reason}: pip install 'multigraft[{command}]'")


def _packages() -> str:
    found = [f"{package} {version}" for package in SHOWN_PACKAGES if (version := _version(package)) is not None]
    return ", ".join(found) or "none of the optional ones"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    flags = _cpu_flags()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    has = [flag for flag in CPU_FLAGS if flag in flags]
    lacks = [flag for flag in CPU_FLAGS if flag not in flags]
    if not flags:
        return f"{usable} threads"
    return (
        f"{usable} threads; has {', '.join(has) or 'no vector extension of note'}; lacks {', '.join(lacks) or 'none'}"
    )


def _cpu_flags() -> frozenset[str]:
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _memory() -> str:
    fields = dict(line.split(":", 1) for line in _lines(Path("/proc/meminfo")) if ":" in line)
    if "MemTotal" not in fields:
        return "unknown on this system"
    total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return f"{size(total)}, {size(free)} available"


def _cuda() -> Finding:
    driver = next(iter(_lines(Path("/proc/driver/nvidia/version"))), None)
    torch = _version("torch")
    if driver is None:
        return Finding("cuda", None, "no NVIDIA driver: the CPU is used")
    if torch is None:
        return Finding("cuda", False, "an NVIDIA driver is there, but torch is not installed")
    if "+cpu" in torch:
        return Finding("cuda", False, f"an NVIDIA driver is there, but torch {torch} is built for the CPU only")
    return Finding("cuda", True, driver.strip())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
