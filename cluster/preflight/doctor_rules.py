"""What the examination of a cluster means: from what the nodes saw to findings, each with what to do. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from outlast.cluster.formatting import counted, size
from outlast.cluster.preflight.finding import Finding, Level

GIB = 2**30
#: Ray puts nothing more on a disk that is fuller than this.
FULL_SHARE = 0.95
MIN_SHM_BYTES = 2**28
MIN_MEMORY_BYTES = 2**29
#: Without a run file: what a small run needs.
MIN_DISK_BYTES = GIB
CLOCK_WARNING_S = 1.0
#: A lag below this is the time that a call takes.
LAG_NOISE_S = 0.05
SLOW_WRITE = 20e6
SLOW_PUT_S = 0.5
SLOW_LINK = 10e6
#: A name server that answers takes milliseconds; one that does not, several seconds.
SLOW_NAME_S = 1.0
#: File systems that several machines mount; only there can a listing lag behind.
NETWORKED = ("nfs", "cifs", "smb", "fuse", "ceph", "lustre", "gpfs", "beegfs", "9p", "glusterfs", "virtiofs", "afs")


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a run asks of a cluster.

    Attributes:
        storage: Where it keeps its checkpoints; None if nothing is known of a run.
        workers: Worker processes.
        cpus: CPUs of each; None for what fits.
        gpus: GPUs of each.
        settle_s: How far the run allows listings to lag.
        weights_bytes: Size of its weights in fp32, if that is known beforehand.
        newest_bytes: Size of its newest checkpoint, if it has one.
        keep_last: Checkpoints that stay.
    """

    storage: str | None = None
    workers: int = 1
    cpus: float | None = None
    gpus: float = 0
    settle_s: float = 0
    weights_bytes: int | None = None
    newest_bytes: int | None = None
    keep_last: int = 3


Facts = Mapping[str, Mapping[str, Any]]


@dataclass
class _Findings:
    """Collects the findings of one check, and says that all is well if there are none."""

    check: str
    found: list[Finding] = field(default_factory=list)

    def warn(self, text: str, hint: str) -> None:
        self.found.append(Finding(Level.WARNING, self.check, text, hint))

    def fail(self, text: str, hint: str) -> None:
        self.found.append(Finding(Level.FAILED, self.check, text, hint))

    def or_ok(self, text: str) -> list[Finding]:
        return self.found or [Finding(Level.OK, self.check, text)]


def check_versions(facts: Facts) -> list[Finding]:
    """Every node has every library, all have the same."""
    report, names = _Findings("versions"), next(iter(facts.values()))["versions"]
    for name in names:
        having = _by_value(facts, lambda fact, name=name: fact["versions"].get(name))  # type: ignore[misc]
        what = "outlast's code" if name == "outlast" else name
        if missing := having.pop("missing", None):
            report.fail(f"{what} is missing on {_nodes(missing)}", "install the same requirements on every node")
        if len(having) > 1:
            said = "; ".join(f"{value} on {_nodes(nodes)}" for value, nodes in having.items())
            report.fail(f"{what} differs: {said}", "install the same versions on every node: start all from one image")
    all_of = ", ".join(f"{name} {text}" for name, text in names.items())
    return report.or_ok(f"{_count(facts)}: {all_of}")


def check_devices(facts: Facts, resources: Mapping[str, Mapping[str, float]], wanted: Requirements) -> list[Finding]:
    """The workers fit, and the processors are of one kind: else the bits differ from node to node."""
    report = _Findings("devices")
    there = {key: sum(node.get(key, 0) for node in resources.values()) for key in ("CPU", "GPU")}
    need = {"CPU": (wanted.cpus or 0) * wanted.workers, "GPU": wanted.gpus * wanted.workers}
    for key, number in need.items():
        if number > there[key] + 1e-6:
            report.fail(
                f"{counted(wanted.workers, 'worker')} would take {number:g} {key}s, there are {there[key]:g}",
                "add nodes, or use fewer scale.workers",
            )
    for node, fact in facts.items():
        offered, found = resources.get(node, {}).get("GPU", 0), fact["gpus"]
        if wanted.gpus and offered and not found:
            report.warn(f"{node} offers {offered:g} GPUs, and nvidia-smi finds none", "fine for GPUs of another maker")
        elif wanted.gpus and offered > len(found):
            report.fail(
                f"{node} offers {offered:g} GPUs, and nvidia-smi finds {len(found)}",
                f"run nvidia-smi on {node}; start Ray there with --num-gpus={len(found)}",
            )
    same = "exact resume holds between equal ones only: use nodes of one kind, or expect other last bits"
    working = {node: fact for node, fact in facts.items() if resources.get(node, {}).get("CPU", 0)}
    cpus = _by_value(working, lambda fact: fact["cpu"])
    gpus = _by_value({node: fact for node, fact in facts.items() if fact["gpus"]}, lambda fact: fact["gpus"][0]["name"])
    for having in (cpus, gpus):
        if len(having) > 1:
            report.warn("; ".join(f"{kind} on {_nodes(nodes)}" for kind, nodes in having.items()), same)
    cards = "".join(f" ({name})" for name in gpus)
    return report.or_ok(f"{there['CPU']:g} CPUs ({', '.join(cpus) or 'none'}), {there['GPU']:g} GPUs{cards}")


def check_memory(facts: Facts, wanted: Requirements) -> list[Finding]:
    """Memory that is free within the control group, and /dev/shm."""
    report = _Findings("memory")
    each = math.ceil(wanted.workers / max(1, len(facts)))
    need = (wanted.weights_bytes or 0) * 4 * each if not wanted.gpus else 0
    for node, fact in facts.items():
        memory, shm = fact["memory"], fact["shm"]
        free, limit = memory["available"], memory["limit"]
        within = f" of the {size(limit)} that its control group allows" if limit else f" of {size(memory['total'])}"
        if free < MIN_MEMORY_BYTES:
            report.warn(f"{node} has {size(free)} free{within}", "end what else runs there, or raise the limit")
        elif free < need:
            report.warn(
                f"{node} has {size(free)} free{within}; weights, gradients and moments of {counted(each, 'worker')} "
                f"take about {size(need)}",
                "use fewer workers a node, more nodes, or scale.parallel: fsdp",
            )
        if shm is not None and shm["total"] < MIN_SHM_BYTES:
            report.warn(
                f"{node}: /dev/shm has {size(shm['total'])}, too little for Ray's objects and NCCL",
                "docker run --shm-size=1g, or an emptyDir with medium: Memory on /dev/shm",
            )
    least = min(fact["memory"]["available"] for fact in facts.values())
    return report.or_ok(f"at least {size(least)} free")


def check_disk(facts: Facts, wanted: Requirements) -> list[Finding]:
    """Room for Ray on each node's disk, and for checkpoints in the storage."""
    report = _Findings("disk")
    for node, fact in facts.items():
        disk = fact["disk"]
        if disk is not None and disk["free"] < disk["total"] * (1 - FULL_SHARE):
            report.warn(
                f"{node}: {disk['path']} is {1 - disk['free'] / disk['total']:.0%} full; Ray puts nothing more there "
                f"from {FULL_SHARE:.0%}",
                f"free some space on {node}, or start Ray there with --temp-dir on another disk",
            )
    one = wanted.newest_bytes or 3 * (wanted.weights_bytes or 0)  # weights and two moments
    spaces = {node: fact["storage"] for node, fact in facts.items() if fact["storage"] and "free" in fact["storage"]}
    for node, space in spaces.items():
        where = f"{wanted.storage} has {size(space['free'])} left (as {node} sees it)"
        if space["free"] < one:
            report.fail(f"{where}; one checkpoint takes about {size(one)}", "free some space, or use another storage")
        elif space["free"] < max(one * (wanted.keep_last + 1), MIN_DISK_BYTES):
            takes = f"{counted(wanted.keep_last + 1, 'checkpoint')} take about {size(one * (wanted.keep_last + 1))}"
            report.warn(f"{where}; {takes if one else 'that is little'}", "free some space, or lower keep_last")
        if report.found and len({(item["kind"], item["source"]) for item in spaces.values()}) == 1:
            break  # the same everywhere
    least = min((fact["disk"]["free"] for fact in facts.values() if fact["disk"]), default=0)
    left = f"; {size(min(space['free'] for space in spaces.values()))} in the storage" if spaces else ""
    return report.or_ok(f"at least {size(least)} free for Ray{left}")


def check_shared(
    facts: Facts, wanted: Requirements, writers: Mapping[str, Mapping[str, Any]], seen: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Each node sees what every other one wrote.

    Args:
        facts: What the nodes are.
        wanted: What the run asks.
        writers: What `write` answered, by node; with `fault` where it failed.
        seen: What `watch` answered, by node; likewise.
    """
    report, place = _Findings("storage"), wanted.storage
    for verb, answers in (("write to", writers), ("read", seen)):
        for fault, nodes in _by_value(answers, lambda answer: answer.get("fault")).items():
            if fault is not None:
                hint = next(str(answers[node].get("hint", "")) for node in nodes)
                report.fail(f"{_nodes(nodes)} cannot {verb} {place}: {fault}", hint)
    words = {node: answer["word"] for node, answer in writers.items() if "word" in answer}
    blind: dict[str, list[str]] = {}
    for node, answer in seen.items():
        if "read" in answer:
            unseen = [other for other, word in words.items() if answer["read"].get(other) != word]
            if unseen:
                blind[node] = unseen
    if blind:
        lonely = [node for node in blind if len(blind[node]) == len(words.keys() - {node})]
        odd = lonely if len(lonely) < len(seen) else list(blind)
        unseen_by_odd = sorted({other for node in odd for other in blind[node]})
        what = f"what {_nodes(unseen_by_odd)} wrote" if len(odd) < len(seen) else "each other's files"
        where = "; ".join(f"{_kind(facts, node)} on {node}" for node in odd)
        report.fail(
            f"{place} is not shared: {_nodes(odd)} {'does' if len(odd) == 1 else 'do'} not see {what} ({where})",
            "mount the same file system there on every node, or set checkpoint.storage to an object store; "
            "`outlast doctor` tells whether it only lags",
        )
    return report.or_ok(f"{place}: what each of {_count(facts)} wrote, all read")


def check_lag(lags: Mapping[tuple[str, str], float | None], wanted: Requirements) -> list[Finding]:
    """How long a listing on one node lags behind a write on another; None for one that never came."""
    report = _Findings("listing lag")
    worst = max(lags.values(), key=lambda lag: math.inf if lag is None else lag, default=0.0)
    mount = "mount with noac,lookupcache=none (NFS), which makes it 0"
    if worst is None:
        writer, reader = next(pair for pair, lag in lags.items() if lag is None)
        report.fail(f"what {writer} wrote had not appeared on {reader} in time", f"{mount}, or use an object store")
    elif worst > max(LAG_NOISE_S, wanted.settle_s):
        writer, reader = max(lags, key=lambda pair: lags[pair] or 0)
        report.fail(
            f"what {writer} writes appears on {reader} {worst:.1f} s later; the run allows {wanted.settle_s:g} s",
            f"set checkpoint.settle_s to {math.ceil(worst * 1.5)}, or {mount}",
        )
    return report.or_ok("none" if not worst or worst <= LAG_NOISE_S else f"{worst:.1f} s, as the run allows")


def check_speed(speeds: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """Bytes a second, all nodes at once, and the time of small operations."""
    report = _Findings("speed")
    for node, speed in speeds.items():
        if speed["write"] < SLOW_WRITE or speed["put_s"] > SLOW_PUT_S:
            report.warn(
                f"{node} writes {size(speed['write'])}/s, a small file in {speed['put_s'] * 1000:.0f} ms",
                "save less often (checkpoint.every: auto weighs the cost), or use a quicker storage",
            )
    slowest = {key: min(speed[key] for speed in speeds.values()) for key in ("write", "read")}
    longest = {key: max(speed[key] for speed in speeds.values()) * 1000 for key in ("put_s", "list_s", "delete_s")}
    return report.or_ok(
        f"each node at least: write {size(slowest['write'])}/s, read {size(slowest['read'])}/s; at most: small file "
        f"{longest['put_s']:.0f} ms, list {longest['list_s']:.0f} ms, delete {longest['delete_s']:.0f} ms"
    )


def check_clock(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """How far clocks differ from the one here. It is never a reason not to start: no order follows from a clock.

    Args:
        offsets: Seconds ahead, and how sure that is, by node.
    """
    report = _Findings("clock")
    for node, (offset, error) in offsets.items():
        if abs(offset) - error > CLOCK_WARNING_S:
            side = "ahead of" if offset > 0 else "behind"
            report.warn(
                f"{node} is {abs(offset):.1f} s {side} this node: saves before an announced loss come at the wrong "
                "time, and an object store refuses requests that are a quarter of an hour off",
                f"let a time service (chrony, systemd-timesyncd) set the clock of {node}",
            )
    worst = max((abs(offset) for offset, _ in offsets.values()), default=0.0)
    return report.or_ok(f"within {max(0.01, worst):.2f} s")


def check_ports(facts: Facts, faults: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Each node reaches each other one at a port that nobody agreed on beforehand, as gloo and NCCL use them.

    Args:
        facts: What the nodes are.
        faults: What was wrong, by the node that knocked and the one that it knocked at.
    """
    report = _Findings("ports")
    pairs = {(here, there): fault for here, found in faults.items() for there, fault in found.items()}
    for (here, there), fault in pairs.items():
        both = (there, here) in pairs
        if both and here > there:
            continue  # told the other way round
        report.fail(
            f"{here} and {there} cannot reach each other: {fault}" if both else f"{here} cannot reach {there}: {fault}",
            "let the cluster's nodes talk to each other on all ports: firewall, security group, network policy",
        )
    for node, fact in facts.items():
        elsewhere = any(other["address"] != fact["address"] for other in facts.values())
        if elsewhere and (not fact["gloo_address"] or fact["gloo_address"].startswith("127.")):
            report.fail(
                f"{node}: gloo would offer the others {fact['gloo_address'] or 'no address'}, going by "
                f"{fact['gloo_interface'] or 'the host name ' + fact['host']}",
                f"set GLOO_SOCKET_IFNAME={fact['interface'] or 'its interface'} where Ray starts on {node}, or let the "
                f"name mean {fact['address']} (/etc/hosts)",
            )
    return report.or_ok(f"{_count(facts)} reach each other" if len(facts) > 1 else "one node: nothing to reach")


def check_names(seconds: Mapping[str, float | Mapping[str, str]]) -> list[Finding]:
    """How long each node searches for the name of an address, as torch does in each worker that joins a group."""
    report, known = _Findings("names"), {node: took for node, took in seconds.items() if isinstance(took, float)}
    if slow := [node for node, took in known.items() if took > SLOW_NAME_S]:
        report.warn(
            f"{_nodes(slow)}: the name of an address takes up to {max(known.values()):.1f} s, which each start of the "
            "workers waits for",
            "let the DNS server in /etc/resolv.conf answer for the nodes' addresses, or list them in /etc/hosts",
        )
    return (
        report.or_ok(f"each search for an address's name ends within {max(known.values()) * 1000:.0f} ms")
        if known
        else []
    )


def check_all_reduce(
    answers: Mapping[str, Mapping[str, Any]], backend: str, facts: Facts, num_bytes: int
) -> list[Finding]:
    """A real sum over the nodes."""
    report = _Findings("all-reduce")
    faults = _by_value(answers, lambda answer: answer.get("fault"))
    rates = [answer["rate"] for answer in answers.values() if "rate" in answer]
    for fault, nodes in faults.items():
        if fault is not None:
            where = ", ".join(
                f"{node} at {facts[node]['gloo_address']} ({facts[node]['gloo_interface'] or facts[node]['interface']})"
                for node in nodes
                if node in facts
            )
            report.fail(
                f"{backend} failed on {_nodes(nodes)} ({where}): {fault}",
                f"name the interface that joins the nodes: {backend.upper()}_SOCKET_IFNAME, where Ray starts",
            )
    if rates and not report.found and min(rates) < SLOW_LINK:
        report.warn(f"{backend}: {size(min(rates))}/s", "put the nodes on one network; each step adds all gradients up")
    speed = f": {size(num_bytes)} at {size(min(rates))}/s" if rates else ""
    return report.or_ok(f"{backend}, {len(answers)} ranks{speed}")


def shares_files(facts: Facts) -> bool:
    """Whether a listing may lag: some node's storage is a file system of the network."""
    kinds = [fact["storage"]["kind"] for fact in facts.values() if fact["storage"]]
    return any(kind.startswith(NETWORKED) for kind in kinds)


def _kind(facts: Facts, node: str) -> str:
    space = facts[node]["storage"] if node in facts else None
    return f"{space['kind']} from {space['source']}" if space else "an object store"


def _by_value(answers: Facts, key: Callable[[Mapping[str, Any]], Any]) -> dict[Any, list[str]]:
    """Nodes by what they say, the most frequent answer first."""
    found: dict[Any, list[str]] = {}
    for node, answer in answers.items():
        found.setdefault(key(answer), []).append(node)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _nodes(nodes: Iterable[str]) -> str:
    names = list(nodes)
    if len(names) <= 4:
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"{', '.join(names[:3])} and {len(names) - 3} more"


def _count(facts: Facts) -> str:
    return counted(len(facts), "node")
