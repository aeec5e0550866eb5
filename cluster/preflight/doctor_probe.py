"""What `outlast doctor` does on each node: looks at the machine, and tries storage and network for real.

It travels by value, so that a node with another outlast, or none, can be asked all the same: what is not in the
standard library is imported where it is used. It tells what it saw, as plain dictionaries, and judges nothing. It must
leave nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIBRARIES = ("ray", "torch", "transformers")
CONNECT_S = 3.0
_BLOCK = 8 * 2**20
_NUM_SMALL = 16


class Probe:
    """One node's side of the examination.

    Args:
        place: The run's storage, or None.
        folder: Where in it this examination writes.
    """

    def __init__(self, place: str | None = None, folder: str = "") -> None:
        self._place, self._folder = place, folder
        self._door: socket.socket | None = None
        self._written: set[str] = set()

    def facts(self, *, gpus: bool) -> dict[str, Any]:
        """The machine as it is: versions, devices, memory, disk, addresses, and the storage's file system."""
        return {
            "host": socket.gethostname(),
            "versions": _versions(),
            "cpu": cpu_capability(),
            "gpus": find_gpus() if gpus else [],
            "memory": _memory(),
            "shm": _space("/dev/shm"),
            "disk": _space(_ray_folder()),
            "storage": _file_system(self._place),
            **_addresses(),
        }

    def clock(self) -> float:
        return time.time()

    # -- storage ------------------------------------------------------------------------------------------------------

    @property
    def _storage(self) -> Any:
        from outlast.checkpointing.storage.factory import open_storage

        assert self._place is not None
        return open_storage(self._place)

    def write(self, name: str) -> dict[str, Any]:
        """Writes a token. Returns it, and when it was written."""
        word = secrets.token_hex(16)
        self._put(name, [word.encode()])
        return {"word": word, "written": time.time()}

    def watch(self, names: Iterable[str], limit_s: float) -> dict[str, Any]:
        """Looks for files, by listing and reading, until all are there or `limit_s` is over.

        Returns:
            The text of each that was found, and when each was last looked for in vain.
        """
        from outlast.checkpointing.storage.base import read_bytes

        storage, deadline, pause_s = self._storage, time.monotonic() + limit_s, 0.005
        read: dict[str, str] = {}
        missed: dict[str, float] = {}
        while True:
            for name in sorted(set(names) - read.keys()):
                began = time.time()
                listed = {entry.name for entry in storage.list(self._folder)}
                try:
                    text = read_bytes(storage, f"{self._folder}/{name}").decode(errors="replace")
                except FileNotFoundError:
                    missed[name] = began
                    continue
                if name in listed:
                    read[name] = text
                else:
                    missed[name] = began
            if read.keys() >= set(names) or time.monotonic() > deadline:
                return {"read": read, "missed": missed}
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.2)

    def write_and_watch(self, name: str, others: Iterable[str], limit_s: float) -> dict[str, Any]:
        return {**self.write(name), **self.watch(others, limit_s)}

    def write_speed(self, name: str, num_bytes: int) -> dict[str, float]:
        """Writes a large file and several small ones. Bytes a second, and seconds for a small one."""
        block = os.urandom(min(_BLOCK, num_bytes))
        began = time.perf_counter()
        self._put(name, [block] * (num_bytes // len(block)))
        large = time.perf_counter()
        for number in range(_NUM_SMALL):
            self._put(f"{name}-{number}", [b"small"])
        small = time.perf_counter()
        return {"write": num_bytes / (large - began), "put_s": (small - large) / _NUM_SMALL}

    def read_speed(self, name: str) -> dict[str, float]:
        """Reads a large file (past the page cache, where one may), lists, and deletes its own small files."""
        num_bytes, storage = 0, self._storage
        began = time.perf_counter()
        with storage.open(f"{self._folder}/{name}") as file:
            with contextlib.suppress(OSError, AttributeError, ValueError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while data := file.read(_BLOCK):
                num_bytes += len(data)
        read = time.perf_counter()
        storage.list(self._folder)
        listed = time.perf_counter()
        small = [name for name in self._written if name.rpartition("-")[2].isdecimal()]
        for name in small:
            self._delete(name)
        deleted = time.perf_counter()
        return {
            "read": num_bytes / (read - began),
            "list_s": listed - read,
            "delete_s": (deleted - listed) / max(1, len(small)),
        }

    def clean(self) -> None:
        """Deletes what it wrote."""
        for name in sorted(self._written):
            self._delete(name)

    def _put(self, name: str, chunks: Sequence[bytes]) -> None:
        self._written.add(name)
        self._storage.put(f"{self._folder}/{name}", chunks)

    def _delete(self, name: str) -> None:
        self._storage.delete(f"{self._folder}/{name}")
        self._written.discard(name)

    # -- network ------------------------------------------------------------------------------------------------------

    def listen(self) -> tuple[str, int, str]:
        """Opens a port that tells everyone who comes a word. Returns address, port and word."""
        import ray

        word = secrets.token_hex(8)
        self._door = socket.create_server(("", 0), backlog=512)
        threading.Thread(target=_greet, args=(self._door, word.encode()), daemon=True).start()
        return ray.util.get_node_ip_address(), self._door.getsockname()[1], word

    def check_connection(self, doors: Mapping[str, tuple[str, int, str]]) -> dict[str, str]:
        """Goes to each door. Returns what was wrong, by the name of the door."""
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(_check_connection, doors.values())
            return {name: fault for name, fault in zip(doors, found, strict=True) if fault}

    def look_up(self, addresses: Iterable[str]) -> float:
        """Seconds of the slowest search for an address's name; torch makes such a search when it joins a group."""
        slowest = 0.0
        for address in addresses:
            began = time.perf_counter()
            with contextlib.suppress(OSError):  # no name is no harm
                socket.getnameinfo((address, 0), 0)
            slowest = max(slowest, time.perf_counter() - began)
        return slowest

    def free_port(self) -> tuple[str, int]:
        """This node's address, and a port that nobody has."""
        import ray

        with socket.create_server(("", 0)) as server:
            return ray.util.get_node_ip_address(), server.getsockname()[1]

    def all_reduce(
        self, rank: int, size: int, meeting: tuple[str, int], backend: str, num_bytes: int, limit_s: float
    ) -> dict[str, Any]:
        """Adds a tensor up over all ranks, twice: once to connect, once to measure.

        Returns:
            Bytes a second, or `fault`, what the library said.
        """
        import torch
        import torch.distributed as dist

        device = "cuda" if backend == "nccl" else "cpu"
        try:
            dist.init_process_group(
                backend,
                init_method=f"tcp://{meeting[0]}:{meeting[1]}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=limit_s),
            )
            dist.all_reduce(torch.ones(1, device=device))
            tensor = torch.full((num_bytes // 4,), float(rank + 1), device=device)
            began = time.perf_counter()
            dist.all_reduce(tensor)
            right = bool((tensor == size * (size + 1) / 2).all())
            rate = num_bytes / (time.perf_counter() - began)
            dist.destroy_process_group()
        except RuntimeError as error:  # what every backend raises
            return {"fault": " ".join(str(error).split())[:300]}
        return {"rate": rate} if right else {"fault": "the sum is wrong"}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found | {"outlast": _code_digest()}


def _code_digest() -> str:
    """Says which outlast this is: of one that travelled with a job there is no version to ask for."""
    digest = hashlib.sha256()
    for room in ("checkpointing", "trainers", "cluster"):
        try:
            spec = find_spec(f"outlast.{room}")
        except ModuleNotFoundError:
            spec = None
        for place in (spec.submodule_search_locations if spec else None) or ():
            for path in sorted(Path(place).glob("*.py")):
                digest.update(path.name.encode() + path.read_bytes())
        if spec is None:
            return "missing"
    return digest.hexdigest()[:8]


def cpu_capability() -> str:
    """Which of torch's kernels this processor runs; they differ in the last bits."""
    if chosen := os.environ.get("ATEN_CPU_CAPABILITY"):
        return chosen.upper()
    with contextlib.suppress(OSError):
        flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
        has = set(flags.split())
        if has >= {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"}:
            return "AVX512"
        if has >= {"avx2", "fma"}:
            return "AVX2"
    return platform.machine()


def find_gpus() -> list[dict[str, Any]]:
    query = "--query-gpu=name,memory.total,memory.free"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [{"name": name, "total": int(total) * 2**20, "free": int(free) * 2**20} for name, total, free in rows]


def _memory() -> dict[str, int | None]:
    """Bytes of memory: of the machine, free for us, and what the control groups allow."""
    import psutil

    machine = psutil.virtual_memory()
    available, limit = machine.available, None
    for folder in _control_groups():
        for name, used_name in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # "max", or not this version's file
                allowed = int((folder / name).read_text())
                if allowed < machine.total:
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    used = int((folder / used_name).read_text()) - int(stat.get("inactive_file", 0))
                    limit = min(limit or allowed, allowed)
                    available = min(available, allowed - used)
    return {"total": machine.total, "available": available, "limit": limit}


def _control_groups() -> Iterable[Path]:
    """The memory control groups of this process, and those around them, of both versions."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                base = root / controllers
                inner = base / path.lstrip("/")
                yield from {base, inner, *(parent for parent in inner.parents if parent.is_relative_to(base))}


def _ray_folder() -> str:
    import ray

    node = ray._private.worker._global_node
    return str(node.get_temp_dir_path()) if node else tempfile.gettempdir()


def _space(path: str) -> dict[str, Any] | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return {"path": path, "total": usage.total, "free": usage.free}


def _file_system(place: str | None) -> dict[str, Any] | None:
    """Where a local storage lies on this node: kind and source of its file system, and the space there."""
    if place is None or ("://" in place and not place.startswith("file://")):
        return None
    path = Path(place.removeprefix("file://"))
    there = next(parent for parent in (path, *path.parents) if parent.exists()).resolve()
    best = ("", "", "unknown")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            source, mount, kind, *_ = line.split()
            mount = mount.replace("\\040", " ")
            if there.is_relative_to(mount) and len(mount) >= len(best[0]):
                best = (mount, source, kind)
    return {"mount": best[0], "source": best[1], "kind": best[2], **(_space(str(there)) or {})}


def _addresses() -> dict[str, Any]:
    """This node's address in the cluster and its interface, and the address that gloo would offer to the others."""
    import psutil
    import ray

    mine = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
    by_name = {
        name: [item.address for item in items if item.family == socket.AF_INET]
        for name, items in psutil.net_if_addrs().items()
    }
    wanted = os.environ.get("GLOO_SOCKET_IFNAME")
    if wanted:
        offered = next((address for name in wanted.split(",") for address in by_name.get(name, [])), "")
    else:
        try:
            offered = socket.gethostbyname(socket.gethostname())
        except OSError:
            offered = "127.0.0.1"  # so says gloo, to its own log
    interface = next((name for name, addresses in by_name.items() if mine in addresses), "")
    return {"address": mine, "interface": interface, "gloo_interface": wanted, "gloo_address": offered}


def _greet(door: socket.socket, word: bytes) -> None:
    while True:
        try:
            visitor, _ = door.accept()
        except OSError:
            return
        with visitor, contextlib.suppress(OSError):
            visitor.sendall(word)


def _check_connection(door: tuple[str, int, str]) -> str:
    address, port, word = door
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S) as visit:
            visit.settimeout(CONNECT_S)
            heard = visit.recv(64).decode(errors="replace")
    except OSError as error:
        return f"{address}:{port}: {error}"
    return "" if heard == word else f"{address}:{port}: somebody else answers there"
