"""Process groups of one generation: connected through a store of their own, and aborted from any thread.

gloo has no abort: a collective waits for a peer that is stopped, and for a survivor that has given up. So the sockets
that a generation's groups have opened are recorded, and shut down when the generation ends: each waiting collective
then raises, in whichever thread it is. (Tried on torch 2.13; listening sockets must stay open, gloo aborts the process
otherwise.) Linux only.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

import torch
import torch.distributed as dist

from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.torch_internals import abort_groups, restart_group_names
from outlast.trainers.distributed.world import World

#: A member that dies while the groups connect is noticed by the roster; this bounds a wait that cannot be aborted.
CONNECT_S = 10.0
#: Nobody waits that long: the roster ends a generation that hangs.
_UNLIMITED = timedelta(hours=12)


class GroupConnections:
    """The sockets of one generation's groups.

    Attributes:
        is_aborted: Whether they are shut down.
        has_nccl: Whether there are NCCL's communicators too, which it aborts itself.
    """

    def __init__(self) -> None:
        self.has_nccl = False
        self._own: set[str] = set()
        self._before: set[str] | None = None
        self._lock = threading.Lock()
        self.is_aborted = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the sockets that the block opens."""
        with self._lock:
            self._before = {name for _, name in _sockets()}
        try:
            yield
        finally:
            with self._lock:
                self._own |= {name for _, name in _sockets()} - self._before
                self._before = None
            if self.is_aborted:
                self.abort()

    def abort(self) -> None:
        """Shut the sockets down, so that collectives raise, those that wait now and those that begin later."""
        is_first, self.is_aborted = not self.is_aborted, True
        if is_first and self.has_nccl:  # not tried on a device
            threading.Thread(target=abort_groups, name="outlast-abort", daemon=True).start()
        with self._lock:
            for number, name in _sockets():
                if name in self._own or (self._before is not None and name not in self._before):
                    _shut_down(number)


def _sockets() -> list[tuple[int, str]]:
    """Return this process' sockets: descriptor, and a name that is not used again while the socket exists."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if (target := os.readlink(f"/proc/self/fd/{number}")).startswith("socket:"):
                found.append((int(number), target))
    return found


def _shut_down(number: int) -> None:
    with suppress(OSError):
        duplicate = socket.socket(fileno=os.dup(number))
        with duplicate:
            is_tcp = duplicate.family in (socket.AF_INET, socket.AF_INET6)  # Ray's own are Unix sockets
            if is_tcp and not duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                duplicate.shutdown(socket.SHUT_RDWR)


class GenerationWorld(World):
    """The ranks of one generation, whose groups can be aborted.

    Args:
        connections: Records the groups' sockets.
        device: Device of this rank.
        node: As in `World`, like the next two.
        log: The file of this process' standard error.
        marks: When this process reached what comes before.
    """

    def __init__(
        self,
        connections: GroupConnections,
        device: torch.device,
        node: str = "",
        log: str = "",
        marks: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._connections = connections
        with connections.recording():
            super().__init__(device, node, log, marks)

    @property
    def is_aborted(self) -> bool:
        """Whether the generation has ended."""
        return self._connections.is_aborted

    def duplicate(self) -> RankGroup:
        with self._connections.recording():
            return super().duplicate()


def connect(
    connections: GroupConnections, meeting: str, number: int, rank: int, size: int, backend: str = "gloo"
) -> None:
    """Connect this process with the others of generation `number`, through the store or folder at the URL `meeting`.

    Raises RuntimeError if one of them is gone.
    """
    if size == 1:
        return
    place, limit = urlsplit(meeting), timedelta(seconds=CONNECT_S)
    with connections.recording():
        if place.scheme == "file":
            shared: dist.Store = dist.FileStore(f"{unquote(place.path)}/{number}", size)
            shared.set_timeout(limit)
        else:
            shared = dist.TCPStore(str(place.hostname), int(place.port or 0), None, False, timeout=limit)
        prefixed = dist.PrefixStore(f"generation-{number}", shared)
        connections.has_nccl = backend == "nccl"
        backend = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=_UNLIMITED)


def disconnect() -> None:
    """Leave the groups; all that is still waiting in them must have been aborted."""
    if dist.is_initialized():
        dist.destroy_process_group()
    restart_group_names()
