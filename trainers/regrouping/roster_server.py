"""Server of the roster: one connection per process, which ends when the process does.

It lives outside of the ranks, so that it outlives each of them, and hosts the store through which a generation connects
itself. A process that the kernel ends is noticed by the end of its connection, one that is stopped or cut off by its
silence. Messages are JSON; a connection needs the key.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

from torch.distributed import TCPStore

from outlast.trainers.regrouping.roster import Roster, RosterState

#: Longest silence of a process that sends a heartbeat every `membership.BEAT_S`.
SILENCE_S = 5.0


class RosterServer:
    """Serves a roster until it is closed.

    Args:
        roster: What is served.
        host: Address to listen on.
        silence_s: Silence after which a process counts as lost.

    Attributes:
        address: Where processes connect: host, port.
        key: What they need to connect.
        losses: Each loss: name, reason, and when it was noticed, in seconds since the epoch.
    """

    def __init__(self, roster: Roster, host: str = "127.0.0.1", silence_s: float = SILENCE_S) -> None:
        self._roster, self._silence_s = roster, silence_s
        listening = socket.create_server((host, 0))  # torch's own socket listens on every interface
        port = listening.getsockname()[1]
        self._store = TCPStore(
            host,
            port,
            None,
            True,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        self.key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), family="AF_INET", backlog=64)
        self.address = (str(self._listener.address[0]), int(self._listener.address[1]))
        self.losses: list[tuple[str, str, float]] = []
        self._connections: dict[str, Connection[Any, Any]] = {}
        self._lock = threading.RLock()
        threading.Thread(target=self._accept, name="outlast-roster", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        with suppress(OSError):
            self._listener.close()
        with self._lock:
            for connection in self._connections.values():
                connection.close()

    def expel(self, name: str, reason: str) -> None:
        """Remove a process that holds up the others, such as one whose training thread hangs."""
        with self._lock:
            if connection := self._connections.get(name):
                self._send(name, {"kind": "expelled", "reason": reason})
                self._lose(name, connection, reason)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        """Handle one process' messages, until it is lost."""
        name, reason = "", "its connection ended"
        with suppress(EOFError, OSError, ValueError, KeyError, AuthenticationError):
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            while True:
                if not connection.poll(self._silence_s):
                    reason = f"silent for {self._silence_s:g} s"
                    break
                message = json.loads(connection.recv_bytes())
                if message["kind"] == "join":
                    name = message["name"]
                if name:
                    self._handle(name, connection, message)
        with self._lock:
            if self._connections.get(name) is connection:
                self._lose(name, connection, reason)

    def _handle(self, name: str, connection: Connection[Any, Any], message: Mapping[str, Any]) -> None:
        with self._lock:
            match message["kind"]:
                case "join":
                    self._connections[name] = connection
                    self._send(name, {"kind": "store", "host": self.address[0], "port": self._store.port})
                    self._roster.join(name, message["rank"])
                    self._advance()
                case "arrive":
                    was = self._roster.state
                    self._roster.arrive(name, message["number"])
                    if was is RosterState.FORMING and self._roster.state is RosterState.RUNNING:
                        self._announce("begin")
                case "done":
                    self._roster.finish()
                    for spare in self._roster.spares:
                        self._send(spare, {"kind": "done"})
                case "beat":
                    self._roster.step(message["step"])

    def _lose(self, name: str, connection: Connection[Any, Any], reason: str) -> None:
        """Remove a process and tell the others at once, also if the next generation has to wait for a spare."""
        del self._connections[name]
        with suppress(OSError):
            connection.close()
        self.losses.append((name, reason, time.time()))
        self._roster.lose(name)
        is_done = self._roster.state is RosterState.DONE
        if not is_done and self._roster.newest is not None and name in self._roster.newest.members:
            for other in self._roster.newest.members:
                self._send(other, {"kind": "interrupt", "number": self._roster.newest.number, "lost": name})
        self._advance()

    def _advance(self) -> None:
        if self._roster.advance() is not None:
            self._announce("generation")
        elif self._roster.state is RosterState.GIVEN_UP:
            for name in list(self._connections):
                self._send(name, {"kind": "expelled", "reason": "too many losses without a step"})

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
