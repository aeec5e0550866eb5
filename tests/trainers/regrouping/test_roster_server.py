"""The roster's server: who may connect, and who is lost."""

from __future__ import annotations

import socket
import threading
import time
from queue import Queue

from outlast.trainers.regrouping.membership import Member
from outlast.trainers.regrouping.roster import Roster
from outlast.trainers.regrouping.roster_server import Loss, RosterServer


def test_strangers_hold_no_thread() -> None:
    """They connect and send nothing, or no answer to the challenge."""
    server = RosterServer(Roster(1), silence_s=0.5)
    before = threading.active_count()
    strangers = [socket.create_connection(server.address) for _ in range(20)]
    for stranger in strangers[::2]:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    deadline = time.monotonic() + 20
    while threading.active_count() < before + len(strangers[1::2]) and time.monotonic() < deadline:
        time.sleep(0.01)
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
    member = Member(server.address, server.key, "worker-0", 0)
    assert member.take_seat(20.0) is not None, "it still serves those with the key"
    member.leave()
    server.close()
    for stranger in strangers:
        stranger.close()


def test_a_member_that_ends_is_lost_and_one_that_is_done_is_not() -> None:
    losses: Queue[Loss] = Queue()
    server = RosterServer(Roster(2), on_loss=losses.put)
    members = [Member(server.address, server.key, f"worker-{rank}", rank) for rank in (0, 1)]
    members[1].leave()
    lost = losses.get(timeout=20)
    assert (lost.name, lost.has_raised, lost.is_silent) == ("worker-1", False, False)
    spare = Member(server.address, server.key, "worker-1-2", None)
    members[0].finish("done")
    members[0].leave()
    assert spare.take_seat() is None
    assert spare.outcome == "done"
    assert losses.empty()
    spare.leave()
    server.close()
