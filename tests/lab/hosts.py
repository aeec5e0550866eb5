"""A Ray cluster of several hosts on one machine: each in a network, mount, PID and UTS namespace of its own.

Host 0 is the head, 10.99.N.10; the others are workers. A switch (a bridge in a namespace of its own) joins them and
this machine, 10.99.N.1, where N is the first network that no other lab uses; what a lab that was killed left there is
removed first. Every host has its own /tmp/ray, knows the others' names, sees the file system of this machine (the
shared storage), and runs `ray start --block` as its first process, as a container does: SIGKILL to that one is a
machine that vanishes, SIGTERM is an eviction, and a link that goes down is a network that swallows packets.

Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

BIN = Path(sys.executable).parent
_READ_ONLY = "mount --rbind /tmp /tmp && mount -o remount,ro,bind / && "
HEAD, MOST_HOSTS = 0, 20
#: Dead nodes are noticed within about three seconds instead of a minute.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def why_not() -> str | None:
    """Why this machine cannot have a lab, or None."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("ip", "bridge", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (packages iproute2 and util-linux)"
    made = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True)
    return None if made.returncode == 0 else f"namespaces are not allowed here: {made.stderr.decode().strip()}"


def _free_network() -> tuple[int, IO[str]]:
    """The number of a network that no living lab has, and the file whose lock says so until it is closed."""
    for number in range(256):
        lock = (Path(tempfile.gettempdir()) / f"outlast-lab-{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return number, lock
    raise AssertionError("all 256 networks for labs are in use")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Lab:
    """The hosts. Use as a context manager; everything that it started ends with it.

    Args:
        environment: Variables for every host.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._network, self._lock = _free_network()
        self._prefix = f"lab{self._network}"
        self._switch = f"{self._prefix}-sw"
        self._folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self._hosts: dict[int, subprocess.Popen[bytes]] = {}
        self._known: set[int] = set()
        self._places: set[str] = set()
        self._environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(self._folder),
            **QUICK_HEALTH_CHECKS,
            **(environment or {}),
        }

    @property
    def address(self) -> str:
        """The head's job server."""
        return f"http://{self.ip(HEAD)}:8265"

    def __enter__(self) -> Lab:
        self._clear()
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "br0", "up")
        run("ip", "link", "add", f"{self._prefix}", "type", "veth", "peer", "name", "us", "netns", self._switch)
        run("ip", "-n", self._switch, "link", "set", "us", "master", "br0", "up")
        run("ip", "addr", "add", f"10.99.{self._network}.1/24", "dev", self._prefix)
        run("ip", "link", "set", self._prefix, "up")
        names = {"127.0.0.1": "localhost", self.here: self._prefix}
        names |= {self.ip(host): self.name(host) for host in range(MOST_HOSTS)}
        (self._folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names.items()))
        (self._folder / "resolv.conf").touch()  # no server: one that cannot be reached costs 6 s a question
        return self

    def __exit__(self, *_: object) -> None:
        for host in list(self._hosts):
            self.kill(host)
        self._clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        for place in self._places:  # what was mounted there went with the hosts
            with contextlib.suppress(OSError):
                Path(place).rmdir()
        self._lock.close()

    def _clear(self) -> None:
        """Ends and removes all that has this lab's name, whoever made it."""
        for line in run("ip", "netns").splitlines():
            name = line.split()[0]
            if name.startswith(f"{self._prefix}-"):
                for pid in run("ip", "netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                run("ip", "netns", "del", name)
        subprocess.run(["ip", "link", "del", self._prefix], capture_output=True)

    def name(self, host: int) -> str:
        return f"{self._prefix}-h{host}"

    @property
    def here(self) -> str:
        """This machine's address, as the hosts see it."""
        return f"10.99.{self._network}.1"

    def ip(self, host: int) -> str:
        return f"10.99.{self._network}.{10 + host}"

    def _plug_in(self, host: int) -> None:
        name = self.name(host)
        run("ip", "netns", "add", name)
        run("ip", "link", "add", "name", "e0", "netns", name, "type", "veth", "peer", f"p{host}", "netns", self._switch)
        run("ip", "-n", self._switch, "link", "set", f"p{host}", "master", "br0", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", name, "addr", "add", f"{self.ip(host)}/24", "dev", "e0")
        run("ip", "-n", name, "link", "set", "e0", "up")
        run("ip", "-n", name, "route", "add", "default", "dev", "e0")
        self._known.add(host)

    def start(
        self,
        host: int,
        *,
        cpus: float = 1,
        parameters: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        mounts: Mapping[str, Path] | None = None,
        read_only: bool = False,
    ) -> None:
        """Starts Ray on a host; on one that was started before, anew.

        Args:
            host: Its number.
            cpus: CPUs that it offers, unless `parameters` says so.
            parameters: More options of `ray start`, as KubeRay's `rayStartParams` has them.
            environment: More variables.
            mounts: What of this machine the host sees elsewhere, by the place where it sees it.
            read_only: Its file system is, except for /tmp, which it shares with this machine, and /dev.
        """
        assert host not in self._hosts
        if host not in self._known:
            self._plug_in(host)
        if host == HEAD:
            role = "--head --port=6379 --dashboard-host=0.0.0.0 --include-dashboard=true"
        else:
            role = f"--address={self.ip(HEAD)}:6379"
        given = {"num-cpus": f"{cpus:g}", "object-store-memory": "80000000", **(parameters or {})}
        options = " ".join(
            [f"--node-ip-address={self.ip(host)}", *(f"--{key}={value}" for key, value in given.items())]
        )
        self._places |= set(mounts or {})
        place = "{{ test -e {at} || mkdir -p {at}; }} && mount --bind {what} {at} && "
        binds = "".join(place.format(at=at, what=what) for at, what in (mounts or {}).items())
        private = self._folder / f"h{host}-{time.monotonic_ns()}"
        private.mkdir()
        names = "".join(f"mount --bind {self._folder}/{name} /etc/{name} && " for name in ("hosts", "resolv.conf"))
        script = (
            f"mkdir -p /tmp/ray && mount --bind {private} /tmp/ray && {names}{binds}"
            f"hostname {self.name(host)} && cd / && {_READ_ONLY if read_only else ''}"
            f"exec ray start {role} {options} --disable-usage-stats --block"
        )
        command = ["ip", "netns", "exec", self.name(host), "unshare", "--mount", "--uts", "--pid", "--fork"]
        command += ["--kill-child", "--mount-proc", "bash", "-c", script]
        with (self._folder / f"h{host}.log").open("ab") as log:
            self._hosts[host] = subprocess.Popen(
                command,
                env={**self._environment, **(environment or {})},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait_for_nodes(self, count: int, timeout_s: float = 120) -> None:
        """Waits until the head answers and knows `count` living nodes, itself among them."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if self._num_nodes() >= count:
                    return
            time.sleep(0.3)
        logs = "\n".join(path.read_text()[-2000:] for path in self._folder.glob("h*.log"))
        raise AssertionError(f"{count} nodes did not come up\n{logs}")

    def _num_nodes(self) -> int:
        headers = {"Authorization": f"Bearer {self._environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.address}/nodes?view=summary", headers=headers)
        with urllib.request.urlopen(request, timeout=5) as answer:
            rows = json.load(answer)["data"]["summary"]
        return sum(row["raylet"]["state"] == "ALIVE" for row in rows)

    def first_process(self, host: int) -> int:
        """The pid, on this machine, of a host's first process."""
        return int(run("pgrep", "-P", str(self._hosts[host].pid)).split()[0])

    def is_up(self, host: int) -> bool:
        return host in self._hosts and self._hosts[host].poll() is None

    def kill(self, host: int) -> None:
        """The machine vanishes."""
        process = self._hosts.pop(host)
        with contextlib.suppress(AssertionError, ProcessLookupError, IndexError):
            os.kill(int(run("pgrep", "-P", str(process.pid)).split()[0]), signal.SIGKILL)
        process.kill()
        process.wait()

    def evict(self, host: int) -> None:
        """SIGTERM to the first process, as a kubelet sends it. The host ends when Ray does."""
        os.kill(self.first_process(host), signal.SIGTERM)

    def wait_until_gone(self, host: int, timeout_s: float = 90) -> None:
        """Waits until a host has ended by itself, and forgets it."""
        self._hosts[host].wait(timeout_s)
        del self._hosts[host]

    def link(self, host: int, *, up: bool) -> None:
        """Cuts a host's link, or mends it. Nobody is told."""
        run("ip", "-n", self._switch, "link", "set", f"p{host}", "up" if up else "down")

    def between(self, one: int, other: int, *, up: bool) -> None:
        """Cuts two hosts off from each other, or mends it; the rest of the network reaches both. Only one pair at a
        time."""
        for host in (one, other):
            run("bridge", "-n", self._switch, "link", "set", "dev", f"p{host}", "isolated", "off" if up else "on")

    def signal_inside(self, host: int, pid: int, number: signal.Signals) -> None:
        """Sends a signal to a process by the pid that it has on its host."""
        run("nsenter", "-t", str(self.first_process(host)), "-p", "-m", "--", "kill", f"-{number.value}", str(pid))

    def pause(self, host: int, *, on: bool) -> None:
        """Stops every process of a host, or lets them all go on: a machine that hangs for a while."""
        for pid in self.pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if on else signal.SIGCONT)

    def pids(self, host: int) -> list[int]:
        """Pids, as on this machine, of all processes of a host."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.name(host)).split()]

    def processes(self, host: int, pattern: str) -> list[int]:
        """Pids, as on the host, of the processes whose command line contains `pattern`."""
        command = ["nsenter", "-t", str(self.first_process(host)), "-p", "-m", "--", "pgrep", "-f", pattern]
        return [int(line) for line in subprocess.run(command, capture_output=True, text=True).stdout.split()]


def host_of(address: str) -> int:
    """The number of the host that has this IP address."""
    return int(address.rsplit(".", 1)[1]) - 10


@contextlib.contextmanager
def lab(num_workers: int, **environment: str) -> Iterator[Lab]:
    """A lab with a head and so many workers, up and running."""
    with Lab(environment) as made:
        made.start(HEAD, cpus=0)
        made.wait_for_nodes(1)
        for host in range(1, num_workers + 1):
            made.start(host)
        made.wait_for_nodes(num_workers + 1)
        yield made
