"""Server of the roster: one connection per process, which ends when the process does.

It lives outside of the ranks, so that it outlives each of them, and hosts the store through which a generation connects
itself. A process that the kernel ends is noticed by the end of its connection, one that is stopped or cut off by its
silence. Messages are JSON; a connection needs the key.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from outlast.trainers.regrouping.roster import Roster, RosterState

#: Longest silence of a process that sends a heartbeat every `membership.BEAT_S`.
SILENCE_S = 5.0
_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class Loss:
    """A process that was lost."""

    name: str
    reason: str
    has_raised: bool  #: an error was raised in it, which it reports itself
    is_silent: bool  #: it exists, as far as is known
    at: float  #: when it was noticed, in seconds since the epoch


class RosterServer:
    """Serves a roster until it is closed.

    Args:
        roster: What is served.
        host: Address to listen on.
        silence_s: Silence after which a process counts as lost.
        meeting_folder: Directory of the files through which generations connect; without it they do so through a
            store on `host`, which whoever reaches that address can change.
        on_loss: Called with each loss, in one of the server's threads.

    Attributes:
        address: Where processes connect: host, port.
        key: What they need to connect.
        losses: All losses so far.
    """

    def __init__(
        self,
        roster: Roster,
        host: str = "127.0.0.1",
        *,
        silence_s: float = SILENCE_S,
        meeting_folder: Path | None = None,
        on_loss: Callable[[Loss], None] = lambda loss: None,
    ) -> None:
        self._roster, self._silence_s, self._on_loss = roster, silence_s, on_loss
        self._store = None if meeting_folder else _open_store(host)
        folder = meeting_folder and meeting_folder / f"generations-{secrets.token_hex(8)}"
        self._meeting = folder.as_uri() if folder else f"tcp://{host}:{self._store.port if self._store else 0}"
        if folder:
            folder.mkdir(mode=0o700)
        self.key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), family="AF_INET", backlog=64)
        self.address = (str(self._listener.address[0]), int(self._listener.address[1]))
        self.losses: list[Loss] = []
        self._outcome = ""
        self._is_closed = False
        self._connections: dict[str, Connection[Any, Any]] = {}
        self._lock = threading.RLock()
        threading.Thread(target=self._accept, name="outlast-roster", daemon=True).start()

    @property
    def has_begun(self) -> bool:
        """Whether there is a generation, so that a process that joins now is a spare."""
        with self._lock:
            return self._roster.newest is not None

    def has_joined(self, name: str) -> bool:
        """Return whether a process has ever joined."""
        with self._lock:
            return self._roster.has_joined(name)

    @property
    def is_waiting(self) -> bool:
        """Whether the next generation lacks a process."""
        with self._lock:
            return self._roster.state is RosterState.GATHERING

    @property
    def has_given_up(self) -> bool:
        """Whether going on in memory is no help."""
        with self._lock:
            return self._roster.state is RosterState.GIVEN_UP

    @property
    def raises_again(self) -> bool:
        """Whether an error comes back without a step between."""
        with self._lock:
            return self._roster.raises_again

    def close(self) -> None:
        """Stop serving."""
        self._is_closed = True
        with suppress(OSError):  # wakes up `accept`, which the end of the listening socket does not
            socket.create_connection(self.address, timeout=1.0).close()
        with self._lock:
            for connection in self._connections.values():
                connection.close()

    def expel(self, name: str, reason: str) -> None:
        """Remove a process that holds up the others, such as one whose training thread hangs."""
        with self._lock:
            if connection := self._connections.get(name):
                self._send(name, {"kind": "expelled", "reason": reason})
                loss = self._lose(name, connection, reason)
        if connection and loss:
            self._on_loss(loss)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection = self._listener.accept()
            except OSError:
                time.sleep(_RETRY_S)  # the connection ended at once, or there are too many
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        self._listener.close()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        """Handle one process' messages, until it is lost."""
        name, reason, has_raised, is_silent = "", "its connection ended", False, False
        with suppress(EOFError, OSError, ValueError, KeyError, TypeError, AuthenticationError):
            _limit_waits(connection, self._silence_s)
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            while True:
                if not connection.poll(self._silence_s):
                    is_silent, reason = True, f"silent for {self._silence_s:g} s"
                    break
                message = json.loads(connection.recv_bytes())
                if message["kind"] == "join":
                    name = message["name"]
                if message["kind"] == "raised":
                    has_raised, reason = True, message["error"]
                    with self._lock:
                        self._roster.step(message["step"])  # so that the next one at this step counts as the second
                    break
                if name:
                    self._handle(name, connection, message)
        loss = None
        with self._lock:
            if self._connections.get(name) is connection:
                loss = self._lose(name, connection, reason, has_raised=has_raised, is_silent=is_silent)
        if loss is not None:
            self._on_loss(loss)

    def _handle(self, name: str, connection: Connection[Any, Any], message: Mapping[str, Any]) -> None:
        with self._lock:
            match message["kind"]:
                case "join":
                    self._connections[name] = connection
                    self._send(name, {"kind": "meeting", "url": self._meeting})
                    self._roster.join(name, message["rank"])
                    if self._roster.state is RosterState.DONE:
                        self._send(name, {"kind": "done", "outcome": self._outcome})
                    self._advance()
                case "arrive":
                    was = self._roster.state
                    self._roster.arrive(name, message["number"])
                    if was is RosterState.FORMING and self._roster.state is RosterState.RUNNING:
                        self._announce("begin")
                case "done":
                    self._roster.finish()
                    self._outcome = message["outcome"]
                    for spare in self._roster.spares:
                        self._send(spare, {"kind": "done", "outcome": self._outcome})
                case "give-up":
                    self._roster.give_up()
                    self._expel_all(f"{name} raised {message['error']}")
                case "beat":
                    self._roster.step(message["step"])

    def _lose(
        self,
        name: str,
        connection: Connection[Any, Any],
        reason: str,
        *,
        has_raised: bool = False,
        is_silent: bool = False,
    ) -> Loss | None:
        """Remove a process and tell the others at once, also if the next generation has to wait for a spare.

        Returns None once training has ended or going on in memory is given up.
        """
        del self._connections[name]
        with suppress(OSError):
            connection.close()
        self._roster.lose(name, has_raised=has_raised)
        is_done = self._roster.state in (RosterState.DONE, RosterState.GIVEN_UP)
        if not is_done and self._roster.newest is not None and name in self._roster.newest.members:
            for other in self._roster.newest.members:
                self._send(other, {"kind": "interrupt", "number": self._roster.newest.number, "lost": name})
        self._advance()
        if is_done:
            return None
        loss = Loss(name, reason, has_raised, is_silent, time.time())
        self.losses.append(loss)
        return loss

    def _advance(self) -> None:
        if self._roster.advance() is not None:
            self._announce("generation")
        elif self._roster.state is RosterState.GIVEN_UP:
            self._expel_all("several losses without a step between them")

    def _expel_all(self, reason: str) -> None:
        for name in list(self._connections):
            self._send(name, {"kind": "expelled", "reason": reason})

    def _announce(self, kind: str) -> None:
        newest = self._roster.newest
        assert newest is not None
        body = {"kind": kind, "number": newest.number, "members": newest.members, "lost": newest.lost}
        for member in newest.members:
            self._send(member, body)

    def _send(self, name: str, body: Mapping[str, Any]) -> None:
        with suppress(OSError, ValueError):  # its own thread notices
            if connection := self._connections.get(name):
                connection.send_bytes(json.dumps(body).encode())


def _limit_waits(connection: Connection[Any, Any], seconds: float) -> None:
    """Make sending to a process that does not receive, and waiting for one that does not send, end with OSError."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _open_store(host: str) -> TCPStore:
    listening = socket.create_server((host, 0))  # torch's own socket listens on every interface
    port = listening.getsockname()[1]
    limit, descriptor = timedelta(seconds=60), listening.detach()
    return TCPStore(host, port, None, True, timeout=limit, wait_for_workers=False, master_listen_fd=descriptor)
