"""`outlast doctor`: examines the Ray cluster that this process is connected to, from every node that a run may use.

The quick part is what `train` runs before anything is held: machines as they are, and a token in the storage that every
node writes and all others read. The rest measures: how far listings lag, speeds, open ports, a real all-reduce.
`doctor_probe.py` looks, `doctor_rules.py` judges; here is who is asked what, and for how long.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outlast.checkpointing.errors import OutlastError, PreflightError, first_line
from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.fault_tolerance.preemption import draining_nodes
from outlast.cluster.preflight import doctor_probe, doctor_rules
from outlast.cluster.preflight.doctor_probe import Probe
from outlast.cluster.preflight.doctor_rules import Facts, Requirements
from outlast.cluster.preflight.finding import Finding, Level

ANSWER_S = 60.0
NAMES_S = 200.0  # three name servers that do not answer, asked twice
STORAGE_S = 300.0
#: How long a token may take to appear where nothing caches, where something may, and until NFS has forgotten (60 s).
UNCACHED_S, QUICK_S, CACHED_S = 5.0, 10.0, 75.0
SPEED_BYTES = 64 * 2**20
REDUCE_BYTES = 32 * 2**20
REDUCE_S = 20.0
PINGS = 3


def requirements_of(config: RunConfig) -> Requirements:
    """What a run asks of a cluster."""
    scale = config.scale
    return Requirements(
        storage=config.checkpoint.storage,
        workers=scale.min_workers,
        cpus=scale.cpus_per_worker,
        gpus=scale.gpus_per_worker,
        settle_s=config.checkpoint.settle_s,
        weights_bytes=None if config.model.lora else _weights_bytes(config.model.path),
        newest_bytes=_newest_bytes(config),
        keep_last=config.checkpoint.keep_last,
    )


def _weights_bytes(path: str | None) -> int | None:
    """Bytes in fp32 of the weights in a model's directory; None for what is not here."""
    folder = Path(path) if path else None
    if folder is None or not folder.is_dir():
        return None
    found = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    body: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        body = json.loads((folder / "config.json").read_text())
    half = str(body.get("dtype") or body.get("torch_dtype")) in ("bfloat16", "float16")
    return sum(file.stat().st_size for file in found) * (2 if half else 1) or None


def _newest_bytes(config: RunConfig) -> int | None:
    """Bytes of the run's newest checkpoint; None if there is none, or no storage, which is found out elsewhere."""
    with contextlib.suppress(OutlastError):
        for manifest in build_catalog(config.store).accepted:
            return manifest.num_bytes
    return None


def preflight(config: RunConfig, tell: Callable[[dict[str, Any]], None]) -> None:
    """The quick part, before a run. Tells warnings.

    Raises:
        PreflightError: Something failed.
    """
    failed = []
    for finding in examine(requirements_of(config), quick=True):
        if finding.level is Level.FAILED:
            failed.append(finding)
        elif finding.level is Level.WARNING:
            tell({"event": "note", "text": f"{finding.check}: {finding.text} ({finding.hint})"})
    if failed:
        raise PreflightError(
            "; ".join(f"{finding.check}: {finding.text}" for finding in failed),
            hint="; ".join(dict.fromkeys(finding.hint for finding in failed)) + "; `outlast doctor RUN.yaml` says more",
        )


def job_server_of() -> str | None:
    """The job server of the cluster that this process is connected to."""
    url: str | None = ray._private.worker._global_node.webui_url
    return f"http://{url.removeprefix('http://')}" if url else None


def examine(wanted: Requirements, *, quick: bool) -> list[Finding]:
    """Examines every node that could hold a worker of the run, and this one."""
    folder = f".doctor/{secrets.token_hex(4)}"
    with _Nodes(wanted, folder, in_process=quick) as nodes:
        facts = nodes.ask("facts", gpus=wanted.gpus > 0)
        nodes.forget(facts)
        facts = {node: fact for node, fact in facts.items() if "fault" not in fact}
        if not facts:
            return nodes.silent or [Finding(Level.WARNING, "nodes", "no node stays", "`ray status`; start some")]
        found = [
            *doctor_rules.check_versions(facts),
            *doctor_rules.check_devices(facts, nodes.resources, wanted),
            *doctor_rules.check_memory(facts, wanted),
            *doctor_rules.check_disk(facts, wanted),
            *doctor_rules.check_clock(nodes.clock_offsets()),
        ]
        if wanted.storage is not None:
            found += _storage(nodes, facts, wanted, quick=quick)
        if not quick:
            found += _network(nodes, facts, wanted)
        return [*nodes.silent, *found]


class _Nodes:
    """The probes, by the name of their node. Use as a context manager; they clean up, and go with it.

    Args:
        wanted: What the run asks.
        folder: Where in the storage they write.
        in_process: Where this node is the only one, ask it without a process of its own.
    """

    def __init__(self, wanted: Requirements, folder: str, *, in_process: bool) -> None:
        here = ray.get_runtime_context().get_node_id()
        rows = [node for node in _staying() if node["NodeID"] == here or _could_hold(node["Resources"], wanted)]
        names = _names(rows)
        rows.sort(key=lambda row: names[row["NodeID"]])
        self.ids = {names[row["NodeID"]]: row["NodeID"] for row in rows}
        self.resources: dict[str, Mapping[str, float]] = {names[row["NodeID"]]: row["Resources"] for row in rows}
        self.silent: list[Finding] = []
        self.files = {node: str(number) for number, node in enumerate(self.ids)}
        self._arguments = (wanted.storage, folder)
        self._local = in_process and len(rows) == 1
        ray.cloudpickle.register_pickle_by_value(doctor_probe)
        self._probes = {node: Probe(*self._arguments) if self._local else self.spawn(node) for node in self.ids}

    def spawn(self, node: str, num_gpus: float = 0) -> Any:
        """One more probe on a node."""
        there = NodeAffinitySchedulingStrategy(self.ids[node], soft=False)
        return ray.remote(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=there)(Probe).remote(*self._arguments)

    def __enter__(self) -> _Nodes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._arguments[0] is not None:
            self.ask("clean", patience_s=STORAGE_S)
        if not self._local:
            ray.cloudpickle.unregister_pickle_by_value(doctor_probe)
            for probe in self._probes.values():
                ray.kill(probe)

    def ask(
        self,
        method: str,
        *,
        each: Mapping[str, tuple[Any, ...]] | None = None,
        patience_s: float = ANSWER_S,
        **same: Any,
    ) -> dict[str, Any]:
        """Asks all nodes at once, or those in `each`, which holds their own arguments.

        Returns:
            The answers; `{"fault": …, "hint": …}` for a question that failed. A node that does not answer at all is
            noted in `silent`, and not asked again.
        """
        arguments = {node: (each or {}).get(node, ()) for node in self._probes if each is None or node in each}
        if self._local:
            return {node: _tried(self._probes[node], method, given, same) for node, given in arguments.items()}
        calls = {node: getattr(self._probes[node], method).remote(*given, **same) for node, given in arguments.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=patience_s)
        answers = {}
        for node, call in calls.items():
            try:
                answers[node] = ray.get(call, timeout=0.1)
            except RayTaskError as error:
                answers[node] = _fault(error.cause)
            except (RayError, GetTimeoutError) as error:
                what = f"not within {patience_s:.0f} s" if isinstance(error, GetTimeoutError) else first_line(error)
                self._drop(node, what)
        return answers

    def forget(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on without the nodes whose answers are faults."""
        for node, answer in answers.items():
            if "fault" in answer:
                self._drop(node, answer["fault"])

    def _drop(self, node: str, why: str) -> None:
        del self._probes[node]
        gone = all(row["NodeID"] != self.ids[node] for row in _staying())
        level = Level.WARNING if gone else Level.FAILED  # a node may go at any time; Ray notices
        hint = f"`ray status`, and Ray's logs on {node} (/tmp/ray/session_latest/logs)"
        self.silent.append(Finding(level, "nodes", f"{node} does not answer: {why}", hint))

    def clock_offsets(self) -> dict[str, tuple[float, float]]:
        """How far each node's clock is ahead of this process's, and how sure that is."""
        if self._local:
            return {}
        best: dict[str, tuple[float, float]] = {}
        for node in [*self._probes] * PINGS:
            began = time.time()
            answer = self.ask("clock", each={node: ()}).get(node)
            ended = time.time()
            if isinstance(answer, float):
                measured = (answer - (began + ended) / 2, (ended - began) / 2)
                best[node] = min(best.get(node, measured), measured, key=lambda item: item[1])
        return best


def _staying() -> list[dict[str, Any]]:
    """Nodes that are alive and not about to go: on those nothing may be started."""
    leaving = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def _could_hold(resources: Mapping[str, float], wanted: Requirements) -> bool:
    cpus = 1e-3 if wanted.cpus is None else wanted.cpus
    return resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= wanted.gpus


def _names(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Names of nodes by id: the host's, if that tells them apart, else Ray's, else with the id."""
    hosts = Counter(row["NodeManagerHostname"] for row in rows)
    names = {
        row["NodeID"]: row["NodeManagerHostname"] if hosts[row["NodeManagerHostname"]] == 1 else row["NodeName"]
        for row in rows
    }
    count = Counter(names.values())
    return {node: name if count[name] == 1 else f"{name}-{node[:6]}" for node, name in names.items()}


def _tried(probe: Probe, method: str, given: tuple[Any, ...], same: Mapping[str, Any]) -> Any:
    try:
        return getattr(probe, method)(*given, **same)
    except OutlastError as error:
        return _fault(error)


def _fault(error: BaseException) -> dict[str, str]:
    if isinstance(error, OutlastError):
        return {"fault": error.message, "hint": error.hint}
    return {"fault": f"{type(error).__name__}: {first_line(error)}", "hint": "`outlast --debug` shows more"}


def _storage(nodes: _Nodes, facts: Facts, wanted: Requirements, *, quick: bool) -> list[Finding]:
    """Every node writes a token, all read all; then how late a listing shows a write, and how fast it is."""
    may_lag = doctor_rules.shares_files(facts)
    limit_s = (QUICK_S if quick else CACHED_S) if may_lag else UNCACHED_S
    writers = nodes.ask("write", each={node: (nodes.files[node],) for node in facts}, patience_s=STORAGE_S)
    able = [node for node, answer in writers.items() if "word" in answer]
    files = {nodes.files[node]: node for node in able}
    seen = nodes.ask(
        "watch", names=list(files), limit_s=limit_s, each=dict.fromkeys(able, ()), patience_s=limit_s + ANSWER_S
    )
    seen = {node: _renamed(answer, files) for node, answer in seen.items()}
    found = doctor_rules.check_shared(facts, wanted, writers, seen)
    if quick or any(finding.level is Level.FAILED for finding in found) or not able:
        return found
    if len(able) > 1:
        found += _lag(nodes, able, wanted, CACHED_S if may_lag else UNCACHED_S)
    large = {node: f"{nodes.files[node]}-large" for node in able}
    speeds: dict[str, Any] = {}
    written = nodes.ask("write_speed", each={node: (large[node], SPEED_BYTES) for node in able}, patience_s=STORAGE_S)
    next_one = dict(zip(able, [*able[1:], able[0]], strict=True))
    read = nodes.ask("read_speed", each={node: (large[next_one[node]],) for node in able}, patience_s=STORAGE_S)
    for node in able:
        both = {**written.get(node, {"fault": "no answer"}), **read.get(node, {"fault": "no answer"})}
        if "fault" in both:
            found.append(Finding(Level.FAILED, "speed", f"{node}: {both['fault']}", both.get("hint", "")))
        else:
            speeds[node] = both
    return found + (doctor_rules.check_speed(speeds) if speeds else [])


def _lag(nodes: _Nodes, able: list[str], wanted: Requirements, limit_s: float) -> list[Finding]:
    """Looks in vain first, as a reader would whose cache must then forget, and then writes on all nodes at once."""
    mine = {node: f"{nodes.files[node]}-late" for node in able}
    by_file = {file: node for node, file in mine.items()}
    nodes.ask("watch", names=list(by_file), limit_s=0.0)
    answers = nodes.ask(
        "write_and_watch",
        each={node: (mine[node], list(by_file), limit_s) for node in able},
        patience_s=limit_s + ANSWER_S,
    )
    offsets = {node: offset for node, (offset, _) in nodes.clock_offsets().items()}
    lags: dict[tuple[str, str], float | None] = {}
    for reader, answer in answers.items():
        for file, writer in by_file.items():
            if "fault" in answer or "fault" in answers.get(writer, {"fault": ""}) or writer == reader:
                continue
            written = answers[writer]["written"] - offsets.get(writer, 0.0)
            missed = answer["missed"].get(file, 0.0) - offsets.get(reader, 0.0)
            lags[writer, reader] = max(0.0, missed - written) if file in answer["read"] else None
    return doctor_rules.check_lag(lags, wanted)


def _renamed(answer: dict[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    if "fault" in answer:
        return answer
    return {"read": {files[name]: text for name, text in answer["read"].items()}}


def _network(nodes: _Nodes, facts: Facts, wanted: Requirements) -> list[Finding]:
    """Doors between all nodes that may hold workers; and if those are open, a sum."""
    working = [node for node in facts if nodes.resources[node].get("CPU", 0) or nodes.resources[node].get("GPU", 0)]
    answers = nodes.ask("listen", each=dict.fromkeys(working, ()))
    nodes.forget(answers)
    doors = {node: tuple(door) for node, door in answers.items() if "fault" not in door}
    others = {here: ({there: door for there, door in doors.items() if there != here},) for here in doors}
    faults = nodes.ask("check_connection", each=others)
    found = doctor_rules.check_ports({node: facts[node] for node in doors}, faults)
    ends = {node: ({facts[node]["address"], facts[next(iter(doors))]["address"]},) for node in doors}
    found += doctor_rules.check_names(nodes.ask("look_up", each=ends, patience_s=NAMES_S))
    if any(finding.level is Level.FAILED for finding in found) or not doors:
        return found
    return found + _all_reduce(nodes, facts, list(doors), wanted)


def _all_reduce(nodes: _Nodes, facts: Facts, working: list[str], wanted: Requirements) -> list[Finding]:
    """One rank on each node, or two if there is just one; each with a GPU where the run wants some."""
    backend, cards = ("nccl", [node for node in working if facts[node]["gpus"]]) if wanted.gpus else ("gloo", working)
    if not cards:
        return []  # `devices` has said so
    ranks = cards if len(cards) > 1 else cards * 2
    if wanted.gpus and len(cards) == 1:
        ranks = cards * min(2, len(facts[cards[0]]["gpus"]))
    probes = [nodes.spawn(node, num_gpus=1 if wanted.gpus else 0) for node in ranks]
    try:
        meeting = ray.get(probes[0].free_port.remote(), timeout=ANSWER_S)
        calls = [
            probe.all_reduce.remote(rank, len(ranks), meeting, backend, REDUCE_BYTES, REDUCE_S)
            for rank, probe in enumerate(probes)
        ]
        answers = dict(zip(_ranks(ranks), ray.get(calls, timeout=ANSWER_S + 2 * REDUCE_S), strict=True))
    except (RayError, GetTimeoutError) as error:
        busy = "the GPUs may be in use: run it while no run is at work" if wanted.gpus else "`ray status` says more"
        text = f"{backend} was not tried: {first_line(error)}"
        return [Finding(Level.WARNING, "all-reduce", text, busy)]
    finally:
        for probe in probes:
            ray.kill(probe)
    return doctor_rules.check_all_reduce(answers, backend, facts, REDUCE_BYTES)


def _ranks(nodes: list[str]) -> list[str]:
    """Names of ranks: their node's, with a number where a node has two."""
    return nodes if len(set(nodes)) == len(nodes) else [f"{node} #{number}" for number, node in enumerate(nodes)]
