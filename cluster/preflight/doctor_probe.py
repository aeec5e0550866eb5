"""The measurements of `outlast doctor` on one node: properties of the machine, and tests of storage and network.

The module is pickled by value, so that it also runs on a node with another outlast, or none: packages other than the
standard library are imported where they are used (`ray_internals` is sent along). It returns plain dictionaries, must
evaluate nothing, and must leave no file behind.
"""

import contextlib
import hashlib
import os
import platform
import random
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
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from outlast.cluster.ray_internals import loopback_rendezvous, loopback_variables, temp_dir

LIBRARIES = ("ray", "torch", "transformers")
CONNECT_TIMEOUT_S = 3.0
_BLOCK = 8 * 2**20
_NUM_SMALL_FILES = 16


class Probe:
    """The measurements of one node.

    Args:
        storage_url: The run's storage, as `parse_location` returns it, or None.
        folder: Folder in the storage for the files of these measurements.
    """

    def __init__(self, storage_url: str | None = None, folder: str = "") -> None:
        self._storage_url, self._folder = storage_url, folder
        self._server: socket.socket | None = None
        self._written: set[str] = set()

    def facts(self, *, gpus: bool) -> dict[str, Any]:
        """Return versions, devices, memory, disk, addresses, and the storage's file system."""
        return {
            "host": socket.gethostname(),
            "versions": _versions(),
            "cpu": cpu_capability(),
            "gpus": find_gpus() if gpus else [],
            "memory": _memory(),
            "shm": _space("/dev/shm"),
            "disk": _space(temp_dir() or tempfile.gettempdir()),
            "storage": _file_system(self._storage_url),
            **_addresses(),
        }

    def clock(self) -> float:
        return time.time()

    # -- storage ------------------------------------------------------------------------------------------------------

    @property
    def _storage(self) -> Any:
        from outlast.checkpointing.storage.factory import open_storage

        assert self._storage_url is not None
        return open_storage(self._storage_url)

    def write(self, name: str) -> dict[str, Any]:
        """Write a random token, and check that the storage keeps bytes. Return the token, and the time of its write."""
        token = secrets.token_hex(16)
        self._put(name, [token.encode()])
        written = time.time()
        with contextlib.suppress(ModuleNotFoundError):  # this node's outlast may be older, which is told elsewhere
            from outlast.checkpointing.storage.round_trip import check_round_trip

            # In a directory of its own: a deletion takes an empty one along, and half-written files in it.
            check_round_trip(self._storage, f"{self._folder}/{name}-bytes/bytes")
        return {"token": token, "written": written}

    def watch(self, files: Mapping[str, str], limit_s: float) -> dict[str, Any]:
        """List and read the nodes' files until all are visible, or `limit_s` has passed.

        Return by node the text of each visible file, and the time of the last attempt that missed each.
        """
        from outlast.checkpointing.storage.base import read_bytes

        storage, deadline, pause_s = self._storage, time.monotonic() + limit_s, 0.005
        read: dict[str, str] = {}
        missed: dict[str, float] = {}
        while True:
            for node in sorted(files.keys() - read.keys()):
                began = time.time()
                listed = {entry.name for entry in storage.list(self._folder)}
                with contextlib.suppress(FileNotFoundError):
                    text = read_bytes(storage, f"{self._folder}/{files[node]}").decode(errors="replace")
                    if files[node] in listed:
                        read[node] = text
                if node not in read:
                    missed[node] = began
            if read.keys() >= files.keys() or time.monotonic() > deadline:
                return {"read": read, "missed": missed}
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.2)

    def write_and_watch(self, name: str, files: Mapping[str, str], limit_s: float) -> dict[str, Any]:
        return {**self.write(name), **self.watch(files, limit_s)}

    def write_speed(self, name: str, num_bytes: int) -> dict[str, float]:
        """Write a large file and several small ones. Return bytes per second, and seconds per small file."""
        blocks = _blocks_of(name, num_bytes)
        began = time.perf_counter()
        self._put(name, blocks)
        large = time.perf_counter()
        for number in range(_NUM_SMALL_FILES):
            self._put(f"{name}-{number}", [b"small"])
        small = time.perf_counter()
        return {"write": num_bytes / (large - began), "put_s": (small - large) / _NUM_SMALL_FILES}

    def read_speed(self, name: str, written_bytes: int) -> dict[str, float]:
        """Read a large file (past the page cache if allowed), list, and delete the small files of this probe.

        Raises StorageRefused if the file is not as `write_speed` wrote it.
        """
        from outlast.checkpointing.errors import StorageRefused

        storage, expected = self._storage, _blocks_of(name, written_bytes)
        num_bytes = sum(map(len, expected))
        began = time.perf_counter()
        with storage.open(f"{self._folder}/{name}") as file:
            with contextlib.suppress(OSError, AttributeError, ValueError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            is_same = all(file.read(len(block)) == block for block in expected) and not file.read(1)
        read = time.perf_counter()
        storage.list(self._folder)
        listed = time.perf_counter()
        small = [name for name in self._written if name.rpartition("-")[2].isdecimal()]
        for name in small:
            self._delete(name)
        deleted = time.perf_counter()
        if not is_same:
            raise StorageRefused(
                f"a file of {num_bytes:,} bytes does not read back as it was written",
                hint="repair the storage, or use another one: a checkpoint would be damaged",
            )
        return {
            "read": num_bytes / (read - began),
            "list_s": listed - read,
            "delete_s": (deleted - listed) / max(1, len(small)),
        }

    def clean(self) -> None:
        """Delete all files of this probe."""
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
        """Open a port that sends a token to every client. Return address, port and token."""
        import ray

        token, address = secrets.token_hex(8), ray.util.get_node_ip_address()
        self._server = socket.create_server((address, 0), family=_family(address), backlog=512)
        threading.Thread(target=_serve_token, args=(self._server, token.encode()), daemon=True).start()
        return address, self._server.getsockname()[1], token

    def check_connection(self, endpoints: Mapping[str, tuple[str, int, str]]) -> dict[str, str]:
        """Connect to each endpoint (address, port, token). Return the faults by the endpoint's name."""
        with ThreadPoolExecutor(16) as pool:
            faults = pool.map(_check_connection, endpoints.values())
            return {name: fault for name, fault in zip(endpoints, faults, strict=True) if fault}

    def look_up(self, addresses: Iterable[str]) -> float:
        """Return the seconds of the slowest reverse name lookup; torch does one when it joins a group."""
        slowest = 0.0
        for address in addresses:
            began = time.perf_counter()
            with contextlib.suppress(OSError):  # a missing name is harmless
                socket.getnameinfo((address, 0), 0)
            slowest = max(slowest, time.perf_counter() - began)
        return slowest

    def rendezvous(self) -> str:
        """Return the URL for a process group: a free port of this node, or a file if its Ray is on the loopback."""
        import ray

        if file := loopback_rendezvous():
            return file
        with socket.create_server(("", 0)) as server:
            return f"tcp://{ray.util.get_node_ip_address()}:{server.getsockname()[1]}"

    def all_reduce(
        self, rank: int, size: int, rendezvous: str, backend: str, num_bytes: int, limit_s: float
    ) -> dict[str, Any]:
        """Run an all-reduce over all ranks twice: once to connect, once to measure.

        Return `rate` in bytes per second, or `fault` with the library's message.
        """
        import torch
        import torch.distributed as dist

        device = "cuda" if backend == "nccl" else "cpu"
        if rendezvous.startswith("file:"):
            os.environ |= loopback_variables()
        try:
            dist.init_process_group(
                backend,
                init_method=rendezvous,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=limit_s),
            )
            dist.all_reduce(torch.ones(1, device=device))
            tensor = torch.full((num_bytes // 4,), float(rank + 1), device=device)
            began = time.perf_counter()
            dist.all_reduce(tensor)
            is_correct = bool((tensor == size * (size + 1) / 2).all())
            rate = num_bytes / (time.perf_counter() - began)
            dist.destroy_process_group()
        except RuntimeError as error:  # raised by every backend
            return {"fault": " ".join(str(error).split())[:300]}
        return {"rate": rate} if is_correct else {"fault": "the sum is wrong"}


def _blocks_of(name: str, num_bytes: int) -> list[bytes]:
    """Return the content of a large file of this name, the same on every node: one random block, repeated."""
    block = random.Random(name).randbytes(min(_BLOCK, num_bytes))
    return [block] * (num_bytes // len(block))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions | {"outlast": _code_digest()}


def _code_digest() -> str:
    """Return a digest of outlast's code: a copy that was sent along with a job has no version."""
    digest = hashlib.sha256()
    try:
        packages = [import_module(f"outlast.{name}") for name in ("checkpointing", "trainers", "cluster")]
    except ModuleNotFoundError:
        return "missing"
    for folder in (Path(place) for package in packages for place in package.__path__):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def cpu_capability() -> str:
    """Return which of torch's CPU kernels this processor runs; they differ in the last bits."""
    if override := os.environ.get("ATEN_CPU_CAPABILITY"):
        return override.upper()
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
    """Return bytes of memory: the machine's total, the available part, and the control groups' limit."""
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
    """Yield this process's memory control groups and their parents, of both cgroup versions: psutil lacks them."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                base = root / controllers
                inner = base / path.lstrip("/")
                yield from {base, inner, *(parent for parent in inner.parents if parent.is_relative_to(base))}


def _space(path: str) -> dict[str, Any] | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return {"path": path, "total": usage.total, "free": usage.free}


def _file_system(storage_url: str | None) -> dict[str, Any] | None:
    """Return type, source and space of a local storage's file system on this node; None for an object store."""
    if storage_url is None or "://" in storage_url:
        return None
    path = Path(storage_url)
    existing = next(parent for parent in (path, *path.parents) if parent.exists()).resolve()
    mount, source, kind = mount_of(existing)
    return {"mount": mount, "source": source, "kind": kind, **(_space(str(existing)) or {})}


def mount_of(existing: Path) -> tuple[str, str, str]:
    """Return mount point, source and type of the file system of a path without links."""
    import psutil

    mounts = [mount for mount in psutil.disk_partitions(all=True) if existing.is_relative_to(mount.mountpoint)]
    if not mounts:
        return "", "", "unknown"
    best = max(reversed(mounts), key=lambda mount: len(mount.mountpoint))  # a later mount hides an earlier one
    return best.mountpoint, best.device, best.fstype


def _addresses() -> dict[str, Any]:
    """Return this node's address and interface in the cluster, and the address that gloo would announce."""
    import psutil
    import ray

    own = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
    by_name = {
        name: [item.address for item in items if item.family == socket.AF_INET]
        for name, items in psutil.net_if_addrs().items()
    }
    configured = os.environ.get("GLOO_SOCKET_IFNAME")
    if configured:
        announced = next((address for name in configured.split(",") for address in by_name.get(name, [])), "")
    else:
        try:
            announced = socket.gethostbyname(socket.gethostname())
        except OSError:
            announced = "127.0.0.1"  # gloo's own fallback
    interface = next((name for name, addresses in by_name.items() if own in addresses), "")
    return {"address": own, "interface": interface, "gloo_interface": configured, "gloo_address": announced}


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _serve_token(server: socket.socket, token: bytes) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.sendall(token)


def _check_connection(endpoint: tuple[str, int, str]) -> str:
    address, port, token = endpoint
    try:
        with socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S) as connection:
            connection.settimeout(CONNECT_TIMEOUT_S)
            received = connection.recv(64).decode(errors="replace")
    except OSError as error:
        return f"{address}:{port}: {error}"
    return "" if received == token else f"{address}:{port}: another program answers there"
