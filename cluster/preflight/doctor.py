"""`outlast doctor`: checks the connected Ray cluster from every node that a run may use.

The quick part is what `train` runs before any resources are allocated: the machines' properties, and a token in the
storage that every node writes and all others read. The rest measures: listing lag, speeds, open ports, an all-reduce.
`doctor_probe.py` measures, `doctor_rules.py` evaluates; this module decides which node runs what, with which timeout.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import OutlastError, PreflightError
from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.checkpointing.run_store.events import NoteEvent
from outlast.checkpointing.storage.location import parse_location
from outlast.checkpointing.storage.regular_files import read_small_file
from outlast.cluster import ray_internals
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.preflight import doctor_probe, doctor_rules
from outlast.cluster.preflight.doctor_probe import Probe
from outlast.cluster.preflight.doctor_rules import Facts, Requirements
from outlast.cluster.preflight.finding import Finding, Level
from outlast.cluster.preflight.plain_http import plain_http_warnings
from outlast.cluster.ray_internals import dashboard_address, draining_nodes, requires_token

CALL_TIMEOUT_S = 60.0
LOOKUP_TIMEOUT_S = 200.0  # three name servers that do not answer, queried twice
STORAGE_TIMEOUT_S = 300.0
#: Time for a token to appear: without caches, with caches (quick part), and until NFS caches expire (60 s).
UNCACHED_TIMEOUT_S, QUICK_TIMEOUT_S, CACHED_TIMEOUT_S = 5.0, 10.0, 75.0
SPEED_BYTES = 64 * 2**20
REDUCE_BYTES = 32 * 2**20
REDUCE_TIMEOUT_S = 20.0
NUM_PINGS = 3
#: Modules that are sent along with the probe: nodes need not have them.
_BY_VALUE = (doctor_probe, ray_internals)


def requirements_of(config: RunConfig) -> Requirements:
    """Return the requirements of a run."""
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
    """Return the bytes in fp32 of the weights in a local model directory; None if there is none."""
    if not path or not (folder := Path(path)).is_dir():
        return None
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    body: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        body = json.loads(read_small_file(folder / "config.json"))
    is_half = str(body.get("dtype") or body.get("torch_dtype")) in ("bfloat16", "float16")
    return sum(file.stat().st_size for file in files) * (2 if is_half else 1) or None


def _newest_bytes(config: RunConfig) -> int | None:
    """Return the bytes of the run's newest checkpoint; None if there is none, or no storage (checked elsewhere)."""
    with contextlib.suppress(OutlastError):
        for manifest in build_catalog(config.store).accepted:
            return manifest.num_bytes
    return None


def preflight(config: RunConfig, tell: Callable[[NoteEvent], None]) -> None:
    """Run the quick part before a run; warnings go to `tell`. Raises PreflightError if a check failed."""
    train = config.data.train
    sources = (config.checkpoint.storage, *([train] if isinstance(train, str) else train))
    for text in plain_http_warnings(storages=sources):
        tell(NoteEvent(text=text))
    findings = examine(requirements_of(config), quick=True)
    for finding in findings:
        if finding.level is Level.WARNING:
            tell(NoteEvent(text=f"{finding.check}: {finding.text} ({finding.hint})"))
    if failed := [finding for finding in findings if finding.level is Level.FAILED]:
        text = "; ".join(f"{finding.check}: {finding.text}" for finding in failed)
        hints = "; ".join(dict.fromkeys(finding.hint for finding in failed))
        raise PreflightError(text, hint=f"{hints}; for details: `outlast doctor RUN.yaml`")


def job_server_address() -> str | None:
    """Return the job server's address of the connected cluster."""
    url = dashboard_address()
    return f"http://{url.removeprefix('http://')}" if url else None


def examine(requirements: Requirements, *, quick: bool) -> list[Finding]:
    """Examine every node that could run a worker, and this one."""
    folder = f".doctor/{secrets.token_hex(4)}"
    with _Nodes(requirements, folder, in_process=quick) as nodes:
        facts = nodes.drop_failed(nodes.call("facts", gpus=requirements.gpus > 0))
        if not facts:
            no_node = Finding(Level.WARNING, "nodes", "no usable node", "see `ray status`; start nodes")
            return nodes.unresponsive or [no_node]
        findings = [
            *doctor_rules.check_versions(facts),
            *doctor_rules.check_access(facts, requires_token=requires_token()),
            *doctor_rules.check_devices(facts, nodes.resources, requirements),
            *doctor_rules.check_memory(facts, requirements),
            *doctor_rules.check_disk(facts, requirements),
            *doctor_rules.check_clock(nodes.clock_offsets()),
        ]
        if requirements.storage is not None:
            findings += _check_storage(nodes, facts, requirements, quick=quick)
        if not quick:
            findings += _check_network(nodes, facts, requirements)
        return [*nodes.unresponsive, *findings]


class _Nodes:
    """The probes, by the name of their node. A context manager: at its end they clean up and are killed.

    They write to `folder` in the storage. With `in_process` the probe runs in this process if this is the only node.
    """

    def __init__(self, requirements: Requirements, folder: str, *, in_process: bool) -> None:
        here = ray.get_runtime_context().get_node_id()
        usable = _usable_nodes()
        fitting = [row for row in usable if row["NodeID"] == here or _fits_worker(row["Resources"], requirements)]
        rows = _by_name(fitting)
        self.ids: dict[str, str] = {name: row["NodeID"] for name, row in rows.items()}
        self.resources: dict[str, Mapping[str, float]] = {name: row["Resources"] for name, row in rows.items()}
        self.unresponsive: list[Finding] = []
        storage = requirements.storage
        self._arguments = (None if storage is None else str(parse_location(storage)), folder)
        self._local = in_process and len(rows) == 1
        for module in _BY_VALUE:
            ray.cloudpickle.register_pickle_by_value(module)
        self._probes = {node: Probe(*self._arguments) if self._local else self.spawn(node) for node in self.ids}

    def spawn(self, node: str, num_gpus: float = 0) -> Any:
        """Start a probe on a node."""
        strategy = NodeAffinitySchedulingStrategy(self.ids[node], soft=False)
        return ray.remote(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=strategy)(Probe).remote(*self._arguments)

    def __enter__(self) -> _Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._arguments[0] is not None:
            self.call("clean", timeout_s=STORAGE_TIMEOUT_S)
        for module in _BY_VALUE:
            ray.cloudpickle.unregister_pickle_by_value(module)
        if not self._local:
            for probe in self._probes.values():
                ray.kill(probe)

    def call(
        self,
        method: str,
        *,
        each: Mapping[str, tuple[Any, ...]] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
        **same: Any,
    ) -> dict[str, Any]:
        """Call a method of all probes at once, or of those in `each`, which holds arguments by node.

        Returns:
            The answers; `{"fault": …, "hint": …}` for a call that failed. A node that does not answer is added to
            `unresponsive` and not called again.
        """
        arguments = {node: (each or {}).get(node, ()) for node in self._probes if each is None or node in each}
        if self._local:
            return {node: _call_locally(self._probes[node], method, given, same) for node, given in arguments.items()}
        calls = {node: getattr(self._probes[node], method).remote(*given, **same) for node, given in arguments.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
        answers = {}
        for node, call in calls.items():
            try:
                answers[node] = ray.get(call, timeout=0.1)
            except RayTaskError as error:
                answers[node] = _as_fault(error.cause)
            except (RayError, GetTimeoutError) as error:
                reason = f"no answer in {timeout_s:.0f} s" if isinstance(error, GetTimeoutError) else first_line(error)
                self._drop(node, reason)
        return answers

    def drop_failed(self, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Drop the nodes whose answers are faults. Return the other answers."""
        for node, answer in answers.items():
            if "fault" in answer:
                self._drop(node, answer["fault"])
        return {node: answer for node, answer in answers.items() if "fault" not in answer}

    def _drop(self, node: str, reason: str) -> None:
        del self._probes[node]
        is_gone = all(row["NodeID"] != self.ids[node] for row in _usable_nodes())
        level = Level.WARNING if is_gone else Level.FAILED  # a node may leave at any time; Ray notices
        hint = f"see `ray status`, and Ray's logs on {node} (/tmp/ray/session_latest/logs)"
        self.unresponsive.append(Finding(level, "nodes", f"{node} is not usable: {reason}", hint))

    def clock_offsets(self) -> dict[str, tuple[float, float]]:
        """Return how far each node's clock is ahead of this process's, and the error bound, in seconds."""
        if self._local:
            return {}
        best: dict[str, tuple[float, float]] = {}
        for node in [*self._probes] * NUM_PINGS:
            began = time.time()
            answer = self.call("clock", each={node: ()}).get(node)
            ended = time.time()
            if isinstance(answer, float):
                measured = (answer - (began + ended) / 2, (ended - began) / 2)
                best[node] = min(best.get(node, measured), measured, key=lambda item: item[1])
        return best


def _usable_nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive and not draining: Ray starts nothing on a draining node."""
    draining = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def _fits_worker(resources: Mapping[str, float], requirements: Requirements) -> bool:
    cpus = 1e-3 if requirements.cpus is None else requirements.cpus
    return resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= requirements.gpus


def _by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the nodes by name, sorted: the host name if unique, else Ray's, else with the id appended."""
    hosts = [row["NodeManagerHostname"] for row in rows]
    names = [host if hosts.count(host) == 1 else row["NodeName"] for host, row in zip(hosts, rows, strict=True)]
    pairs = zip(names, rows, strict=True)
    by_name = {f"{name}-{row['NodeID'][:6]}" if names.count(name) > 1 else name: row for name, row in pairs}
    return {name: by_name[name] for name in sorted(by_name)}


def _call_locally(probe: Probe, method: str, given: tuple[Any, ...], same: Mapping[str, Any]) -> Any:
    try:
        return getattr(probe, method)(*given, **same)
    except OutlastError as error:
        return _as_fault(error)


def _as_fault(error: BaseException) -> dict[str, str]:
    if isinstance(error, OutlastError):
        return {"fault": error.message, "hint": error.hint}
    return {"fault": f"{type(error).__name__}: {first_line(error)}", "hint": "for details: `outlast --debug`"}


def _check_storage(nodes: _Nodes, facts: Facts, requirements: Requirements, *, quick: bool) -> list[Finding]:
    """Have every node write a token and read all others; then measure listing lag and speed."""
    may_lag = doctor_rules.uses_network_file_system(facts)
    limit_s = (QUICK_TIMEOUT_S if quick else CACHED_TIMEOUT_S) if may_lag else UNCACHED_TIMEOUT_S
    writers = nodes.call("write", each={node: (nodes.ids[node],) for node in facts}, timeout_s=STORAGE_TIMEOUT_S)
    working = [node for node, answer in writers.items() if "token" in answer]
    files = {node: nodes.ids[node] for node in working}
    seen = nodes.call(
        "watch", files=files, limit_s=limit_s, each=dict.fromkeys(working, ()), timeout_s=limit_s + CALL_TIMEOUT_S
    )
    findings = doctor_rules.check_shared(facts, requirements, writers, seen)
    if quick or any(finding.level is Level.FAILED for finding in findings) or not working:
        return findings
    if len(working) > 1:
        findings += _measure_lag(nodes, working, requirements, CACHED_TIMEOUT_S if may_lag else UNCACHED_TIMEOUT_S)
    large = {node: f"{nodes.ids[node]}-large" for node in working}
    own = {node: (large[node], SPEED_BYTES) for node in working}
    written = nodes.call("write_speed", each=own, timeout_s=STORAGE_TIMEOUT_S)
    of_next = {node: (large[peer], SPEED_BYTES) for node, peer in zip(working, [*working[1:], working[0]], strict=True)}
    read = nodes.call("read_speed", each=of_next, timeout_s=STORAGE_TIMEOUT_S)
    speeds: dict[str, Any] = {}
    for node in working:
        both = {**written.get(node, {"fault": "no answer"}), **read.get(node, {"fault": "no answer"})}
        if "fault" in both:
            findings.append(Finding(Level.FAILED, "speed", f"{node}: {both['fault']}", both.get("hint", "")))
        else:
            speeds[node] = both
    return findings + (doctor_rules.check_speed(speeds) if speeds else [])


def _measure_lag(nodes: _Nodes, working: list[str], requirements: Requirements, limit_s: float) -> list[Finding]:
    """Look for the files before they exist, which fills negative caches; then write on all nodes at once."""
    files = {node: f"{nodes.ids[node]}-late" for node in working}
    nodes.call("watch", files=files, limit_s=0.0)
    each = {node: (files[node], files, limit_s) for node in working}
    answers = nodes.call("write_and_watch", each=each, timeout_s=limit_s + CALL_TIMEOUT_S)
    answers = {node: answer for node, answer in answers.items() if "fault" not in answer}
    offsets = {node: offset for node, (offset, _) in nodes.clock_offsets().items()}
    lags: dict[tuple[str, str], float | None] = {}
    for writer, reader in itertools.permutations(answers, 2):
        written = answers[writer]["written"] - offsets.get(writer, 0.0)
        missed = answers[reader]["missed"].get(writer, 0.0) - offsets.get(reader, 0.0)
        lags[writer, reader] = max(0.0, missed - written) if writer in answers[reader]["read"] else None
    return doctor_rules.check_lag(lags, requirements)


def _check_network(nodes: _Nodes, facts: Facts, requirements: Requirements) -> list[Finding]:
    """Connect all nodes that may run workers with each other; if that works, run an all-reduce."""
    working = [node for node in facts if nodes.resources[node].get("CPU", 0) or nodes.resources[node].get("GPU", 0)]
    endpoints = nodes.drop_failed(nodes.call("listen", each=dict.fromkeys(working, ())))
    others = {node: ({peer: endpoints[peer] for peer in endpoints if peer != node},) for node in endpoints}
    faults = nodes.call("check_connection", each=others)
    findings = doctor_rules.check_ports({node: facts[node] for node in endpoints}, faults)
    addresses = {node: ({facts[node]["address"], facts[next(iter(endpoints))]["address"]},) for node in endpoints}
    findings += doctor_rules.check_name_lookup(nodes.call("look_up", each=addresses, timeout_s=LOOKUP_TIMEOUT_S))
    if any(finding.level is Level.FAILED for finding in findings) or not endpoints:
        return findings
    return findings + _all_reduce(nodes, facts, list(endpoints), requirements)


def _all_reduce(nodes: _Nodes, facts: Facts, working: list[str], requirements: Requirements) -> list[Finding]:
    """Run an all-reduce with one rank on each node, or two on a single one; each with a GPU if the run needs GPUs."""
    backend = "nccl" if requirements.gpus else "gloo"
    hosts = [node for node in working if facts[node]["gpus"] or not requirements.gpus]
    if not hosts:
        return []  # reported by `devices`
    ranks = hosts if len(hosts) > 1 else hosts * 2
    if requirements.gpus and len(hosts) == 1:
        ranks = hosts * min(2, len(facts[hosts[0]]["gpus"]))
    probes = [nodes.spawn(node, num_gpus=1 if requirements.gpus else 0) for node in ranks]
    try:
        rendezvous = ray.get(probes[0].rendezvous.remote(), timeout=CALL_TIMEOUT_S)
        calls = [
            probe.all_reduce.remote(rank, len(ranks), rendezvous, backend, REDUCE_BYTES, REDUCE_TIMEOUT_S)
            for rank, probe in enumerate(probes)
        ]
        results = ray.get(calls, timeout=CALL_TIMEOUT_S + 2 * REDUCE_TIMEOUT_S)
    except (RayError, GetTimeoutError) as error:
        hint = "the GPUs may be in use: repeat it while nothing runs" if requirements.gpus else "see `ray status`"
        text = f"{backend} was not tested: {first_line(error)}"
        return [Finding(Level.WARNING, "all-reduce", text, hint)]
    finally:
        for probe in probes:
            ray.kill(probe)
    names = ranks if len(set(ranks)) == len(ranks) else [f"{node} #{number}" for number, node in enumerate(ranks)]
    return doctor_rules.check_all_reduce(dict(zip(names, results, strict=True)), backend, facts, REDUCE_BYTES)
