"""Facts about this host."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device | None) -> dict[str, Any]:
    """Processor, number of processors and bytes of memory of this machine, and the accelerator's name."""
    found: dict[str, Any] = {"cpu": platform.processor(), "cpus": os.cpu_count(), "memory": None}
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        found["cpu"] = next(line for line in file if line.startswith("model name")).partition(":")[2].strip()
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        found["memory"] = int(next(line for line in file if line.startswith("MemTotal")).split()[1]) * 1024
    if device is not None and device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def num_oom_kills() -> int | None:
    """How many processes the kernel has killed so far for want of memory, in this container or on this machine."""
    for place in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", place.read_text(), re.MULTILINE)
            if found:
                return int(found[1])
    return None
