"""Facts about this host for reports and failure causes: hardware, and kills by the kernel. It must never raise."""

import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

_CRASH = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)
#: Bytes at the end of a log in which a crash is searched.
_LOG_BYTES = 20_000


def host_facts(device: torch.device | None) -> dict[str, Any]:
    """Return name and number of processors, bytes of memory, and the GPU's name, if the device is one."""
    facts: dict[str, Any] = {"cpu": platform.processor(), "cpus": os.cpu_count()}
    facts["memory"] = psutil.virtual_memory().total
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:  # psutil has no name of the processor
        facts["cpu"] = next(line for line in file if line.startswith("model name")).partition(":")[2].strip()
    if device is not None and device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def processor(device: torch.device) -> str:
    """Return what decides which kernels run: the GPU's name, or the CPU instructions that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.backends.cpu.get_cpu_capability())


def num_oom_kills() -> int | None:
    """Count the kernel's out-of-memory kills so far, in this container or on this machine; None if unknown."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with suppress(OSError):
            match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
            if match:
                return int(match[1])
    return None


def death_evidence(log: str) -> tuple[int | None, str | None]:
    """Return `num_oom_kills`, and the crash that Python's fault handler wrote at the end of a dead worker's log.

    The crash is empty if the log has none, and None if the log cannot be read. SIGKILL leaves none.
    """
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - _LOG_BYTES))
        crashes = _CRASH.findall(file.read().decode(errors="replace"))
        return num_oom_kills(), crashes[-1].strip() if crashes else ""
    return num_oom_kills(), None
