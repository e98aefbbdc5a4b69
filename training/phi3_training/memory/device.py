"""The memory of the device that trains: this machine's RAM, its GPU, or one that is only planned.

Reads psutil, the container's limit, and torch (imported only where there is a GPU).
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil

from ..serve.choice import has_gpu

Kind = Literal["cpu", "cuda", "mps"]

GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Device:
    """A device: bytes in all and free now, and how messages name it."""

    kind: Kind
    name: str
    total: int
    available: int
    bfloat16: bool = True  # a GPU multiplies it in hardware
    is_here: bool = False  # not a planned one

    @property
    def where(self) -> str:
        """`the RAM of this machine has 21.3 GiB free of 23.4`."""
        return f"{self.name} has {gib(self.available)} free of {gib(self.total)}"


def gib(size: float) -> str:
    """A size for people, in binary gigabytes."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def of_size(gigabytes: float, kind: Kind = "cuda") -> Device:
    """A device elsewhere of so many binary gigabytes, with nothing else on it."""
    size = int(gigabytes * GIB)
    name = "the planned GPU" if kind == "cuda" else "the planned machine"
    return Device(kind, name, size, size)


def this_device() -> Device:
    """What `phi3 train` would use here, as finetune/runtime.py chooses it."""
    if has_gpu():
        return _gpu()
    return this_ram()


def this_ram() -> Device:
    """This machine's RAM; a Mac's is its GPU's as well."""
    total, available = _ram()
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Device("mps", "the memory of this Mac", total, available, is_here=True)
    return Device("cpu", "the RAM of this machine", total, available, is_here=True)


@cache
def torch_has_cuda() -> bool:
    """Whether the torch installed here is a build with CUDA's libraries; does not import it."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    # Named libtorch_cuda.so on Linux, torch_cuda.dll on Windows.
    return any((Path(torch.origin).parent / "lib").glob("*torch_cuda*"))


def _gpu() -> Device:
    import torch

    free, total = torch.cuda.mem_get_info()
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device("cuda", torch.cuda.get_device_name(), total, free, bfloat16, is_here=True)


def _ram(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """RAM in all and free, within what a container is allowed."""
    memory = psutil.virtual_memory()
    limit = _number(cgroup / "memory.max")
    if limit is None or limit >= memory.total:
        return memory.total, memory.available
    used = _number(cgroup / "memory.current") or 0
    # Cached files count as used, and are given up when memory is wanted.
    used -= _inactive_files(cgroup / "memory.stat")
    return limit, max(0, min(memory.available, limit - used))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" where there is no limit


def _inactive_files(path: Path) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = [line.split()[1] for line in lines if line.startswith("inactive_file ")]
    return int(counts[0]) if counts else 0
