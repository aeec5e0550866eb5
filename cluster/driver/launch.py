"""The driver: from a run file to a finished run, or to one that can be resumed.

A launch is one start of the driver. It looks at the storage first (is the run done? is another launch at work?), makes
the data, starts Ray Train, and passes signals on. Ray's own checkpoint manager stays empty, and each launch has a Ray
run name of its own: the run's store is the truth.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import ray
import ray.train
import ray.train.torch
import yaml
from ray.autoscaler.sdk import request_resources
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.constants import HEALTH_CHECK_INTERVAL_S_ENV_VAR
from ray.train.v2.api.exceptions import TrainingFailedError

from outlast.checkpointing.errors import OutlastError, PreflightError, StorageError
from outlast.checkpointing.fault_injection import FaultSpec
from outlast.checkpointing.run_store.attempt_history import read_attempt_history, settings_digest
from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.checkpointing.run_store.claims import launch_is_superseded
from outlast.checkpointing.run_store.liveness import LivenessFile, find_active_launch
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.query import find_model
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.elastic_resize import resizers, scaling
from outlast.cluster.driver.provenance import record_provenance
from outlast.cluster.driver.ray_data_encode import encode_on_ray
from outlast.cluster.driver.ray_session import ray_session
from outlast.cluster.driver.signals import _INTERRUPTIONS, _handling, _signals
from outlast.cluster.driver.warm_standby import environment
from outlast.cluster.driver.worker import train_worker
from outlast.cluster.fault_tolerance.coordinator import ask, start_coordinator
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.cluster.fault_tolerance.failure_recorder import FailureRecorder, gave_up
from outlast.cluster.fault_tolerance.restart_policy import decide_give_up
from outlast.cluster.formatting import counted
from outlast.cluster.preflight.doctor import preflight
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.preflight import check_architecture, check_code, check_metric, check_model
from outlast.trainers.checks.resume_checks import check_unchanged
from outlast.trainers.data.sampler import make_plan
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.encode import Encoder
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tracking.follow import check_trackers
from outlast.trainers.user_code import make_importable

EventListener = Callable[[dict[str, Any]], None]

NODES_WAIT_S = 60.0
RECORD_S = 5.0
#: Set where nodes come only when they are asked for, as with the autoscaler of a rendered RayJob: how long to wait.
WAIT_VARIABLE = "OUTLAST_WAIT_FOR_NODES_S"
POLL_S = 0.5  # Ray Train looks after its workers every 2 s by default; with more than 64 of them, less often


class Interrupted(OutlastError):
    """Somebody ended the launch before anything was saved."""

    exit_code = 130


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """Without `DatasetsCallback`, which starts an actor for each attempt: outlast passes no datasets."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


@dataclass(frozen=True, slots=True)
class Finished:
    """How a launch ended."""

    outcome: Outcome
    launch: str
    model: str | None = None


@dataclass(slots=True)
class Launch:
    """One launch of one run.

    Attributes:
        config: The settings, local paths absolute.
        declared: The settings as written.
        take_over: Do not wait to see whether another launch is at work.
        code: Directory of the user's Python files, where the run file lies.
        faults: Faults to arm in the workers.
        tell: Hears every event, in the driver's main thread.
        stdout: Where `tell` prints to.
        joined: Whether the Ray is somebody else's.
        began: When it began, in seconds since the epoch.
        id: Names the launch.
    """

    config: RunConfig
    declared: Mapping[str, Any]
    take_over: bool = False
    code: str = ""
    faults: Sequence[FaultSpec] = ()
    tell: EventListener = lambda event: None
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    joined: bool = field(default=False, init=False)
    began: float = field(default_factory=time.time, init=False)
    id: str = field(default_factory=lambda: time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3))

    def _tell(self, event: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(self.stdout):  # `ray_session` keeps it shut
            self.tell({"t": time.time(), "launch": self.id, **event})

    @property
    def store(self) -> RunStore:
        return self.config.store

    def run(self, address: str | None = None) -> Finished:
        """Starts or resumes the run, or finds it done.

        Raises:
            OutlastError: What went wrong; see `errors.py`.
        """
        try:
            return self._run(address)
        except _INTERRUPTIONS:
            raise Interrupted("interrupted; nothing is saved", hint="run the same command again") from None

    def _run(self, address: str | None) -> Finished:
        store, name = self.store, self.config.name
        make_importable(self.code)
        with _preflight():
            store.storage.list(name)  # not with the patience that others have: the place may be wrong
            base = build_catalog(store).declaration
            check_unchanged(base, self.config, None)
            model = find_model(store)
            if model is not None and not model.faults:
                return Finished(Outcome.DONE, self.id, _published(store, model.path))
            if model is not None:
                self._tell({"event": "damaged-model", "model": model.path, "faults": model.faults})
            rival = None if self.take_over else find_active_launch(store)
            if rival:
                self._tell({"event": "rival", "launch": rival})
                return Finished(Outcome.SUPERSEDED, self.id)
            check_code(self.config)
            check_architecture(self.config)
            make_plan(self.config, 1, self.config.scale.max_workers)
            check_trackers(self.config.track)
            mark = settings_digest(self.declared)
            given_up = decide_give_up(read_attempt_history(store), self.config.failure.limits, mark)
            if given_up is not None:
                raise gave_up(name, given_up)
            self._tell({"event": "phase", "name": "data"})
            prepared = prepare(self.config, store.storage, partial(self._encoders, address))
            check_unchanged(base, self.config, prepared.fingerprint)
            check_metric(self.config, prepared.facts)
            check_model(self.config, prepared, store.storage)
            for note in prepared.notes:
                self._tell({"event": "note", "text": note})
            store.storage.put(f"{name}/run.yaml", [yaml.safe_dump(dict(self.declared), sort_keys=False).encode()])
            alive = LivenessFile(store.storage, f"{store.launch_dir(self.id)}/alive.json", mark, self.began)
            record = record_provenance(store, self.config, self.declared, self.id, prepared, self.code)
        ended: int | None = None
        said = ""
        try:
            finished = self._train(store, prepared, address)
            ended = finished.outcome.exit_code
            return finished
        except _INTERRUPTIONS:
            if not build_catalog(store.fresh()).accepted:
                ended = Interrupted.exit_code
                raise
            ended = Outcome.STOPPED.exit_code
            return Finished(Outcome.STOPPED, self.id)
        except OutlastError as error:
            ended, said = error.exit_code, error.message
            raise
        finally:
            with _handling(signal.SIG_IGN):  # lest it stays unsaid how this ended
                alive.end(ended, said)
            record.join(RECORD_S)

    @contextlib.contextmanager
    def _encoders(self, address: str | None) -> Iterator[Encoder]:
        with ray_session(address):
            yield partial(encode_on_ray, code=self.code)

    def _train(self, store: RunStore, prepared: Prepared, address: str | None) -> Finished:
        plan = make_plan(self.config, prepared.num_samples, self.config.scale.max_workers)
        self._tell({"event": "phase", "name": "ray", "num_steps": plan.num_steps, "num_samples": prepared.num_samples})
        with ray_session(address) as self.joined:
            cpus = self._cpus_per_worker()
            preflight(self.config, self._tell)
            assignment = Assignment(
                config=self.config,
                declared=self.declared,
                launch=self.id,
                prepared=prepared,
                num_threads=max(1, int(cpus)),
                code=self.code,
                faults=tuple(self.faults),
                track=self.config.track,
            )
            try:
                answer = self._fit(assignment, cpus)
            except RunFailed:
                if self._is_superseded(store):  # then it is no matter what its own workers came to
                    return Finished(Outcome.SUPERSEDED, self.id)
                raise
        if isinstance(answer.get("error"), OutlastError):
            raise answer["error"]
        outcome = Outcome(answer["outcome"])
        found = find_model(store.fresh()) if outcome is Outcome.DONE else None
        model = _published(store, found.path) if found else None
        if outcome is Outcome.STOPPED and self._is_superseded(store):
            outcome = Outcome.SUPERSEDED
        return Finished(outcome, self.id, model)

    def _is_superseded(self, store: RunStore) -> bool:
        with contextlib.suppress(StorageError):
            return launch_is_superseded(store, self.id)
        return False

    def _cpus_per_worker(self) -> float:
        """CPUs of a worker. Waits a while for nodes that are on their way, as after a restart of the whole cluster, and
        asks for them where they only come then."""
        patience = os.environ.get(WAIT_VARIABLE)
        deadline = time.monotonic() + (float(patience or NODES_WAIT_S) if self.joined else 0)
        if patience:
            scale = self.config.scale
            bundle = {"CPU": scale.cpus_per_worker or 1.0, "GPU": scale.gpus_per_worker}
            request_resources(bundles=[{key: need for key, need in bundle.items() if need}] * scale.min_workers)
        while True:
            try:
                return self._fit_in(ray.cluster_resources())
            except PreflightError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def _fit_in(self, there: Mapping[str, float]) -> float:
        scale = self.config.scale
        cpus = scale.cpus_per_worker
        if cpus is None and self.joined:
            cpus = 1.0
        elif cpus is None:
            fitting = there.get("CPU", 1.0) / scale.max_workers
            cpus = min(fitting, 1.0) if fitting < 1 else float(int(fitting))
        least = scale.min_workers
        wanted = {"CPU": cpus * least, "GPU": scale.gpus_per_worker * least}
        short = [
            f"{key}: {need:g} wanted, {there.get(key, 0):g} there"
            for key, need in wanted.items()
            if need > there.get(key, 0) + 1e-6
        ]
        if short:
            raise PreflightError(
                f"no room for {counted(least, 'worker')} ({'; '.join(short)})",
                hint="use fewer scale.workers, or smaller scale.cpus_per_worker or scale.gpus_per_worker",
            )
        return cpus

    def _fit(self, assignment: Assignment, cpus: float) -> dict[str, Any]:
        """Runs Ray Train in a side thread, because it takes SIGINT for itself in the main one."""
        scale = self.config.scale
        os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, f"{max(POLL_S, scale.max_workers * POLL_S / 64):g}")
        hub = start_coordinator(self.id)
        resources = {"CPU": cpus} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})
        mark = settings_digest(self.declared)
        recorder = FailureRecorder(self.store.storage.url, self.config.name, self.id, self.config.failure.limits, mark)
        trainer = _Trainer(
            train_worker,
            train_loop_config={"assignment": assignment, "hang_after_s": self.config.failure.hang_after_s},
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if scale.gpus_per_worker else "gloo"),
            scaling_config=scaling(scale, resources),
            run_config=ray.train.RunConfig(
                name=self.id,
                storage_path=f"{self.store.url}/launches",
                failure_config=ray.train.FailureConfig(max_failures=-1, max_preemption_failures=-1),  # see failures.py
                callbacks=[recorder, *resizers(self.config, self.id)],
                worker_runtime_env={"env_vars": environment(self.config)},
            ),
        )
        box: dict[str, Any] = {}

        def fit() -> None:
            try:
                box["answer"] = trainer.fit().return_value
            except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                box["failure"] = error

        thread = threading.Thread(target=fit, daemon=True)
        with _signals() as stopping:
            thread.start()
            asked = begun = False
            while thread.is_alive():
                thread.join(0.25)
                for event in ask(hub.drain.remote(), []):
                    begun |= event["event"] == "plan"
                    self._tell(event)
                if stopping.is_set():
                    if not begun:  # there is nothing to commit, and nobody yet to do it
                        raise KeyboardInterrupt
                    hub.stop.remote()  # each time, because a hub that was restarted has forgotten it
                    if not asked:
                        asked = True
                        self._tell({"event": "stopping"})
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(hub)
        if "failure" in box:
            raise _explained(box["failure"], self.config) from box["failure"]
        answer: dict[str, Any] | None = box["answer"]
        if answer is None:
            raise RunFailed("the workers ended without an answer", hint="run the same command again")
        return answer


@contextlib.contextmanager
def _preflight() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise PreflightError(error.message, hint=error.hint) from error


def _published(store: RunStore, model: str) -> str:
    """Where the user finds the model: at `<run>/model`, a link to the attempt's, where the storage has links."""
    if not isinstance(store.storage, LocalStorage):
        return model
    link = store.storage.path(f"{store.run}/model")
    temporary = link.with_name(f".model.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        temporary.symlink_to(Path(model).relative_to(store.run))
        temporary.replace(link)
        return f"{store.run}/model"
    return model


def _explained(error: BaseException, config: RunConfig) -> OutlastError:
    """Ray's failure as one message: the first rank's cause, not a hundred tracebacks."""
    if isinstance(error, OutlastError):
        return error
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    if isinstance(error, TrainingFailedError) and failures:
        rank = min(failures)
        said = (str(failures[rank]).strip().splitlines() or [repr(failures[rank])])[-1]
        message = f"rank {rank} of {config.scale.max_workers} failed: {said}"
    else:
        lines = [line.strip() for line in str(getattr(error, "controller_failure", error)).splitlines() if line.strip()]
        message = f"Ray Train failed: {type(error).__name__}: {(lines or [''])[-1]}"
    return RunFailed(message, hint="run the same command again to go on from the newest whole checkpoint")
