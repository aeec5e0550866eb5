"""Rules of `outlast doctor`: they turn the nodes' measurements into findings, each with what to do. Pure."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from outlast.cluster.formatting import counted, size
from outlast.cluster.preflight.finding import OPEN_HINT, Finding, Level

GIB = 2**30
#: Ray stops writing to a disk that is fuller than this.
FULL_SHARE = 0.95
MIN_SHM_BYTES = 2**28
MIN_MEMORY_BYTES = 2**29
#: Space for a small run, if no run file is given.
MIN_DISK_BYTES = GIB
CLOCK_WARNING_S = 1.0
#: A lag below this is the duration of a call.
LAG_NOISE_S = 0.05
SLOW_WRITE_BYTES_PER_S = 20e6
SLOW_PUT_S = 0.5
SLOW_LINK_BYTES_PER_S = 10e6
#: A name server answers within milliseconds, or a lookup takes several seconds.
SLOW_LOOKUP_S = 1.0
#: File systems that several machines mount; only their listings can lag.
NETWORK_FILE_SYSTEM = re.compile("nfs|cifs|smb|fuse|ceph|lustre|gpfs|beegfs|9p|glusterfs|virtiofs|afs")


@dataclass(frozen=True, slots=True)
class Requirements:
    """Requirements of a run on a cluster."""

    storage: str | None = None  #: URL or path of the run's storage; None without a run
    workers: int = 1
    cpus: float | None = None  #: CPUs of each worker; None for an equal share
    gpus: float = 0  #: GPUs of each worker
    settle_s: float = 0  #: listing lag that the run allows
    weights_bytes: int | None = None  #: size of the weights in fp32, if known
    newest_bytes: int | None = None  #: size of the newest checkpoint, if there is one
    keep_last: int = 3


Facts = Mapping[str, Mapping[str, Any]]


@dataclass
class _Findings:
    """Findings of one check; a single OK if there are none."""

    check: str
    items: list[Finding] = field(default_factory=list)

    def warn(self, text: str, hint: str) -> None:
        self.items.append(Finding(Level.WARNING, self.check, text, hint))

    def fail(self, text: str, hint: str) -> None:
        self.items.append(Finding(Level.FAILED, self.check, text, hint))

    def or_ok(self, text: str) -> list[Finding]:
        return self.items or [Finding(Level.OK, self.check, text)]


def check_access(facts: Facts, *, requires_token: bool) -> list[Finding]:
    """Check that Ray runs no code for those who reach its ports without its token."""
    report = _Findings("access")
    if not requires_token and not all(ip_address(fact["address"]).is_loopback for fact in facts.values()):
        report.warn("Ray requires no token: any client that reaches a port of a node can run code there", OPEN_HINT)
    return report.or_ok("Ray requires a token" if requires_token else "Ray listens on the loopback only")


def check_versions(facts: Facts) -> list[Finding]:
    """Check that every node has the same version of every library."""
    report, names = _Findings("versions"), next(iter(facts.values()))["versions"]
    for name in names:
        nodes_by_version = _group_by(facts, lambda fact, name=name: fact["versions"].get(name))  # type: ignore[misc]
        label = "outlast's code" if name == "outlast" else name
        if missing := nodes_by_version.pop("missing", None):
            report.fail(f"{label} is missing on {_join_nodes(missing)}", "install the same packages on every node")
        if len(nodes_by_version) > 1:
            differing = "; ".join(f"{value} on {_join_nodes(nodes)}" for value, nodes in nodes_by_version.items())
            report.fail(f"{label} differs: {differing}", "install the same versions: start all nodes from one image")
    versions = ", ".join(f"{name} {text}" for name, text in names.items())
    return report.or_ok(f"{_count(facts)}: {versions}")


def check_devices(facts: Facts, resources: Mapping[str, Mapping[str, float]], needs: Requirements) -> list[Finding]:
    """Check that the workers fit, and that processors are of one kind: else results differ in the last bits."""
    report = _Findings("devices")
    available = {key: sum(node.get(key, 0) for node in resources.values()) for key in ("CPU", "GPU")}
    for key, each in (("CPU", needs.cpus or 0), ("GPU", needs.gpus)):
        if (number := each * needs.workers) > available[key] + 1e-6:
            text = f"{counted(needs.workers, 'worker')} need {number:g} {key}s, the cluster has {available[key]:g}"
            report.fail(text, "add nodes, or lower scale.workers")
    for node, fact in facts.items():
        offered, gpus = resources.get(node, {}).get("GPU", 0), fact["gpus"]
        if needs.gpus and offered and not gpus:
            text = f"{node} offers {offered:g} GPUs, nvidia-smi finds none"
            report.warn(text, "ignore this for GPUs of other vendors")
        elif needs.gpus and offered > len(gpus):
            report.fail(
                f"{node} offers {offered:g} GPUs, nvidia-smi finds {len(gpus)}",
                f"run nvidia-smi on {node}; start Ray there with --num-gpus={len(gpus)}",
            )
    hint = "exact resume needs equal processors: use nodes of one kind, or expect differences in the last bits"
    worker_nodes = {node: fact for node, fact in facts.items() if resources.get(node, {}).get("CPU", 0)}
    cpu_kinds = _group_by(worker_nodes, lambda fact: fact["cpu"])
    gpu_nodes = {node: fact for node, fact in facts.items() if fact["gpus"]}
    gpu_kinds = _group_by(gpu_nodes, lambda fact: fact["gpus"][0]["name"])
    for kinds in (cpu_kinds, gpu_kinds):
        if len(kinds) > 1:
            report.warn("; ".join(f"{kind} on {_join_nodes(nodes)}" for kind, nodes in kinds.items()), hint)
    gpu_names = "".join(f" ({name})" for name in gpu_kinds)
    return report.or_ok(
        f"{available['CPU']:g} CPUs ({', '.join(cpu_kinds) or 'none'}), {available['GPU']:g} GPUs{gpu_names}"
    )


def check_memory(facts: Facts, needs: Requirements) -> list[Finding]:
    """Check free memory within the control group's limit, and the size of /dev/shm."""
    report = _Findings("memory")
    per_node = math.ceil(needs.workers / max(1, len(facts)))
    needed = (needs.weights_bytes or 0) * 4 * per_node if not needs.gpus else 0
    for node, fact in facts.items():
        memory, shm = fact["memory"], fact["shm"]
        free, limit = memory["available"], memory["limit"]
        within = f" of the {size(limit)} that its control group allows" if limit else f" of {size(memory['total'])}"
        if free < MIN_MEMORY_BYTES:
            report.warn(f"{node} has {size(free)} free{within}", "stop other programs there, or raise the limit")
        elif free < needed:
            report.warn(
                f"{node} has {size(free)} free{within}; weights, gradients and moments of {per_node} workers "
                f"need about {size(needed)}",
                "use fewer workers per node, more nodes, or scale.parallel: fsdp",
            )
        if shm is not None and shm["total"] < MIN_SHM_BYTES:
            report.warn(
                f"{node}: /dev/shm has {size(shm['total'])}, too little for Ray's objects and NCCL",
                "docker run --shm-size=1g, or an emptyDir with medium: Memory on /dev/shm",
            )
    min_free = min(fact["memory"]["available"] for fact in facts.values())
    return report.or_ok(f"at least {size(min_free)} free")


def check_disk(facts: Facts, needs: Requirements) -> list[Finding]:
    """Check the space for Ray on each node's disk, and for checkpoints in the storage."""
    report = _Findings("disk")
    for node, fact in facts.items():
        disk = fact["disk"]
        if disk is not None and disk["free"] < disk["total"] * (1 - FULL_SHARE):
            report.warn(
                f"{node}: {disk['path']} is {1 - disk['free'] / disk['total']:.0%} full; Ray stops writing there "
                f"at {FULL_SHARE:.0%}",
                f"free some space on {node}, or start Ray there with --temp-dir on another disk",
            )
    checkpoint_bytes = needs.newest_bytes or 3 * (needs.weights_bytes or 0)  # weights and two moments
    spaces = {node: fact["storage"] for node, fact in facts.items() if fact["storage"] and "free" in fact["storage"]}
    num_kept = needs.keep_last + 1
    need_of_all = f"{counted(num_kept, 'checkpoint')} need about {size(checkpoint_bytes * num_kept)}"
    if checkpoint_bytes * num_kept < MIN_DISK_BYTES:
        need_of_all = f"a run needs at least {size(MIN_DISK_BYTES)}"
    for node, space in spaces.items():
        where = f"{needs.storage} has {size(space['free'])} free (seen from {node})"
        if space["free"] < checkpoint_bytes:
            text = f"{where}; one checkpoint needs about {size(checkpoint_bytes)}"
            report.fail(text, "free some space, or use another storage")
        elif space["free"] < max(checkpoint_bytes * num_kept, MIN_DISK_BYTES):
            report.warn(f"{where}; {need_of_all}", "free some space, or lower keep_last")
        if report.items and len({(item["kind"], item["source"]) for item in spaces.values()}) == 1:
            break  # the same everywhere
    min_free = min((fact["disk"]["free"] for fact in facts.values() if fact["disk"]), default=0)
    storage_free = f"; {size(min(space['free'] for space in spaces.values()))} in the storage" if spaces else ""
    return report.or_ok(f"at least {size(min_free)} free for Ray{storage_free}")


def check_shared(
    facts: Facts, needs: Requirements, writers: Mapping[str, Mapping[str, Any]], seen: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Check that each node can read what every other one wrote: the nodes' results of `write` and of `watch`."""
    report, url = _Findings("storage"), needs.storage
    for verb, answers in (("write to", writers), ("read", seen)):
        for fault, nodes in _group_by(answers, lambda answer: answer.get("fault")).items():
            if fault is not None:
                hint = next(str(answers[node].get("hint", "")) for node in nodes)
                report.fail(f"{_join_nodes(nodes)} cannot {verb} {url}: {fault}", hint)
    tokens = {node: answer["token"] for node, answer in writers.items() if "token" in answer}
    read = {node: answer["read"] for node, answer in seen.items() if "read" in answer}
    missing = {node: [peer for peer in tokens if read[node].get(peer) != tokens[peer]] for node in read}
    if unseen := {node: peers for node, peers in missing.items() if peers}:
        isolated = [node for node in unseen if len(unseen[node]) == len(tokens.keys() - {node})]
        outliers = isolated if len(isolated) < len(seen) else list(unseen)
        writers_missed = sorted({peer for node in outliers for peer in unseen[node]})
        what = f"files of {_join_nodes(writers_missed)}" if len(outliers) < len(seen) else "each other's files"
        where = "; ".join(f"{_file_system(facts, node)} on {node}" for node in outliers)
        verb = "does" if len(outliers) == 1 else "do"
        report.fail(
            f"{url} is not shared: {_join_nodes(outliers)} {verb} not see {what} ({where})",
            "mount the same file system there on every node, or set checkpoint.storage to an object store; "
            "`outlast doctor` shows whether it only lags",
        )
    return report.or_ok(f"{url}: {_count(facts)} read what each wrote")


def check_lag(lags: Mapping[tuple[str, str], float | None], needs: Requirements) -> list[Finding]:
    """Check the seconds that a listing on one node lags behind a write on another; None if it never appeared."""
    report = _Findings("listing lag")
    worst = max(lags.values(), key=lambda lag: math.inf if lag is None else lag, default=0.0)
    mount = "mount with noac,lookupcache=none (NFS), which removes the lag"
    if worst is None:
        writer, reader = next(pair for pair, lag in lags.items() if lag is None)
        report.fail(f"a file of {writer} did not appear on {reader} in time", f"{mount}, or use an object store")
    elif worst > max(LAG_NOISE_S, needs.settle_s):
        writer, reader = max(lags, key=lambda pair: lags[pair] or 0)
        report.fail(
            f"a file of {writer} appears on {reader} {worst:.1f} s later, the run allows {needs.settle_s:g} s",
            f"set checkpoint.settle_s to {math.ceil(worst * 1.5)}, or {mount}",
        )
    return report.or_ok("none" if not worst or worst <= LAG_NOISE_S else f"{worst:.1f} s, which the run allows")


def check_speed(speeds: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """Check bytes per second, with all nodes at once, and the time of small operations."""
    report = _Findings("speed")
    for node, speed in speeds.items():
        if speed["write"] < SLOW_WRITE_BYTES_PER_S or speed["put_s"] > SLOW_PUT_S:
            report.warn(
                f"{node} writes {size(speed['write'])}/s, a small file in {speed['put_s'] * 1000:.0f} ms",
                "save less often (checkpoint.every: auto considers the cost), or use a faster storage",
            )
    slowest = {key: min(speed[key] for speed in speeds.values()) for key in ("write", "read")}
    longest = {key: max(speed[key] for speed in speeds.values()) * 1000 for key in ("put_s", "list_s", "delete_s")}
    return report.or_ok(
        f"each node at least: write {size(slowest['write'])}/s, read {size(slowest['read'])}/s; at most: small file "
        f"{longest['put_s']:.0f} ms, list {longest['list_s']:.0f} ms, delete {longest['delete_s']:.0f} ms"
    )


def check_clock(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Check the clocks by the seconds each is ahead, and their error. Never a failure: nothing is ordered by clocks."""
    report = _Findings("clock")
    for node, (offset, error) in offsets.items():
        if abs(offset) - error > CLOCK_WARNING_S:
            direction = "ahead of" if offset > 0 else "behind"
            report.warn(
                f"{node} is {abs(offset):.1f} s {direction} this node: saves before an announced loss run at the "
                "wrong time, and object stores refuse requests that are 15 minutes off",
                f"run a time service (chrony, systemd-timesyncd) on {node}",
            )
    worst = max((abs(offset) for offset, _ in offsets.values()), default=0.0)
    return report.or_ok(f"within {max(0.01, worst):.2f} s")


def check_ports(facts: Facts, faults: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Check the connections at arbitrary ports, as gloo and NCCL use them; `faults` are by node and by its peer."""
    report = _Findings("ports")
    pairs = {(node, peer): fault for node, by_peer in faults.items() for peer, fault in by_peer.items()}
    for (node, peer), fault in pairs.items():
        is_mutual = (peer, node) in pairs
        if is_mutual and node > peer:
            continue  # reported for the reverse pair
        what = f"{node} and {peer} cannot reach each other" if is_mutual else f"{node} cannot reach {peer}"
        report.fail(f"{what}: {fault}", "open all ports between the nodes: firewall, security group, network policy")
    for node, fact in facts.items():
        has_peers = any(other["address"] != fact["address"] for other in facts.values())
        if has_peers and (not fact["gloo_address"] or fact["gloo_address"].startswith("127.")):
            report.fail(
                f"{node}: gloo would announce {fact['gloo_address'] or 'no address'}, because of "
                f"{fact['gloo_interface'] or 'the host name ' + fact['host']}",
                f"set GLOO_SOCKET_IFNAME={fact['interface'] or 'its interface'} where Ray starts on {node}, or make "
                f"the name resolve to {fact['address']} (/etc/hosts)",
            )
    return report.or_ok(f"{_count(facts)} reach each other" if len(facts) > 1 else "one node: nothing to test")


def check_name_lookup(seconds: Mapping[str, float | Mapping[str, str]]) -> list[Finding]:
    """Check each node's time for a reverse name lookup, which torch does in each worker that joins a group."""
    report = _Findings("names")
    durations = {node: duration for node, duration in seconds.items() if isinstance(duration, float)}
    if not durations:
        return []
    longest_s = max(durations.values())
    if slow := [node for node, duration in durations.items() if duration > SLOW_LOOKUP_S]:
        report.warn(
            f"{_join_nodes(slow)}: a reverse name lookup takes up to {longest_s:.1f} s and delays each start of the "
            "workers",
            "add the nodes' addresses to the DNS server in /etc/resolv.conf, or list them in /etc/hosts",
        )
    return report.or_ok(f"each reverse name lookup ends within {longest_s * 1000:.0f} ms")


def check_all_reduce(
    answers: Mapping[str, Mapping[str, Any]], backend: str, facts: Facts, num_bytes: int
) -> list[Finding]:
    """Check the results of an all-reduce over the nodes."""
    report = _Findings("all-reduce")
    faults = _group_by(answers, lambda answer: answer.get("fault"))
    rates = [answer["rate"] for answer in answers.values() if "rate" in answer]
    for fault, nodes in faults.items():
        if fault is not None:
            known = [(node, facts[node]) for node in nodes if node in facts]
            where = ", ".join(
                f"{node} at {fact['gloo_address']} ({fact['gloo_interface'] or fact['interface']})"
                for node, fact in known
            )
            report.fail(
                f"{backend} failed on {_join_nodes(nodes)} ({where}): {fault}",
                f"set {backend.upper()}_SOCKET_IFNAME, where Ray starts, to the interface that connects the nodes",
            )
    if rates and not report.items and min(rates) < SLOW_LINK_BYTES_PER_S:
        hint = "put the nodes on one network; each step all-reduces the gradients"
        report.warn(f"{backend}: {size(min(rates))}/s", hint)
    speed = f": {size(num_bytes)} at {size(min(rates))}/s" if rates else ""
    return report.or_ok(f"{backend}, {len(answers)} ranks{speed}")


def uses_network_file_system(facts: Facts) -> bool:
    """Return whether a listing may lag: some node's storage is a network file system."""
    kinds = [fact["storage"]["kind"] for fact in facts.values() if fact["storage"]]
    return any(NETWORK_FILE_SYSTEM.match(kind) for kind in kinds)


def _file_system(facts: Facts, node: str) -> str:
    space = facts[node]["storage"] if node in facts else None
    return f"{space['kind']} from {space['source']}" if space else "an object store"


def _group_by(answers: Facts, key: Callable[[Mapping[str, Any]], Any]) -> dict[Any, list[str]]:
    """Group nodes by a value of their answers, the most frequent value first."""
    groups: dict[Any, list[str]] = {}
    for node, answer in answers.items():
        groups.setdefault(key(answer), []).append(node)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _join_nodes(nodes: Iterable[str]) -> str:
    names = list(nodes)
    if len(names) <= 4:
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"{', '.join(names[:3])} and {len(names) - 3} more"


def _count(facts: Facts) -> str:
    return counted(len(facts), "node")
