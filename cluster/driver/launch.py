"""The driver: from a run file to a finished run, or to one that can be resumed.

A launch is one start of the driver. It checks the storage first (is the run done? is another launch active?), prepares
the data, and runs the workers with Ray Train. The run's store is the truth; Ray's view of the run is never used for it.
"""

import contextlib
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

import yaml
from torch import nn

from outlast.checkpointing.errors import OutlastError, PreflightError, StorageError
from outlast.checkpointing.fault_injection import FaultSpec
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.attempt_history import read_attempt_history, settings_digest
from outlast.checkpointing.run_store.catalog import build_catalog, check_unread
from outlast.checkpointing.run_store.claims import launch_is_superseded
from outlast.checkpointing.run_store.liveness import LivenessFile, end_for, find_active_launch, read_liveness
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.round_trip import check_round_trip
from outlast.checkpointing.tools.query import find_model
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.provenance import record_provenance
from outlast.cluster.driver.ray_data_encode import encode_on_ray
from outlast.cluster.driver.ray_session import ray_session
from outlast.cluster.driver.ray_train import Stops, cpus_per_worker, run_workers
from outlast.cluster.driver.signals import (
    INTERRUPTED_EXIT,
    INTERRUPTIONS,
    exit_when_interrupted,
    handle_signals,
    stop_flag,
)
from outlast.cluster.fault_tolerance.failure_callback import gave_up
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.cluster.fault_tolerance.restart_policy import decide_give_up
from outlast.cluster.preflight.doctor import preflight
from outlast.cluster.preflight.validate import check_storage
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.dry_step import dry_step
from outlast.trainers.checks.model_checks import check_architecture, check_code, check_metric, check_model
from outlast.trainers.checks.pretrained_checks import check_pretrained
from outlast.trainers.checks.resume_checks import check_unchanged
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.encode import Encoder
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tracking.follow import check_trackers
from outlast.trainers.user_code import make_importable

EventListener = Callable[[dict[str, Any]], None]

RECORD_S = 5.0


class Interrupted(OutlastError):
    """The launch was interrupted before anything was saved."""

    exit_code = INTERRUPTED_EXIT


@dataclass(frozen=True, slots=True)
class Finished:
    """How a launch ended."""

    outcome: Outcome
    launch: str
    model: str | None = None


class WorkersHost(Protocol):
    """What runs a launch's workers in the driver's place, so that they outlive it."""

    def train(
        self, config: RunConfig, assignment: Assignment, cpus: float, listener: EventListener, liveness: LivenessFile
    ) -> Finished:
        """Run the workers to the launch's end, and keep its liveness file. Raises as `run_workers`."""

    def kill(self) -> None:
        """End the workers at once."""


@dataclass(slots=True)
class Launch:
    """One launch of one run.

    Attributes:
        config: The settings, local paths absolute.
        declared: The settings as written.
        take_over: Do not check whether another launch is active.
        code: Directory of the run file and the user's Python files.
        faults: Faults to arm in the workers.
        tell: Called with every event, in the driver's main thread.
        stdout: Standard output of `tell`.
        host: Makes what runs the workers, given the settings and the launch; used on an existing cluster.
        began: Start time, seconds since the epoch.
        id: Name of the launch.
    """

    config: RunConfig
    declared: Mapping[str, Any]
    take_over: bool = False
    code: str = ""
    faults: Sequence[FaultSpec] = ()
    tell: EventListener = lambda event: None
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    began: float = field(default_factory=time.time, init=False)
    id: str = field(default_factory=lambda: time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3))
    host: Callable[[RunConfig, str], contextlib.AbstractContextManager[WorkersHost]] | None = None
    _liveness: LivenessFile | None = field(default=None, init=False)
    _host: WorkersHost | None = field(default=None, init=False)

    def _publish(self, event: events.Event) -> None:
        self._publish_body(event.to_json())

    def _publish_body(self, body: dict[str, Any]) -> None:
        if self._liveness is not None:
            self._liveness.apply(body)
        with contextlib.redirect_stdout(self.stdout):  # `ray_session` redirects it to /dev/null
            self.tell({"t": time.time(), "launch": self.id, **body})

    @property
    def store(self) -> RunStore:
        return self.config.store

    def run(self, address: str | None = None) -> Finished:
        """Start or resume the run, or return at once if it is done. Raises the errors of `errors.py`."""
        try:
            return self._run(address)
        except INTERRUPTIONS:
            raise Interrupted(
                f"interrupted; {exit_when_interrupted(self.store)[1]}", hint="run the same command again"
            ) from None

    def quit(self) -> tuple[int, str]:
        """Record that the driver's process is about to exit without an orderly end; callable from any thread.

        Returns the exit code, and what is saved.
        """
        if self._host is not None:
            self._host.kill()
        exit_code, saved = exit_when_interrupted(self.store)
        if self._liveness is not None:
            self._liveness.end(exit_code)
            end_for(self.store, self.id, exit_code, "")
        return exit_code, saved

    def _run(self, address: str | None) -> Finished:
        store, name = self.store, self.config.name
        make_importable(self.code)
        with _preflight():
            check_storage(self.config)  # lists it without retries: the path may be mistyped
            catalog = build_catalog(store)
            check_unread(store, catalog, catalog.accepted[0].ref if catalog.accepted else None)
            base = catalog.declaration
            check_unchanged(base, self.config, None)
            published = find_model(store)
            if published is not None and not published.faults:
                return Finished(Outcome.DONE, self.id, _link_model(store, published.path))
            if published is not None:
                self._publish(events.DamagedModelEvent(model=published.path, faults=tuple(published.faults)))
            active = None if self.take_over else find_active_launch(store)
            if active:
                self._publish(events.ActiveLaunchEvent(launch=active))
                return Finished(Outcome.SUPERSEDED, self.id)
            check_code(self.config)
            check_architecture(self.config)
            make_plan(self.config, 1, self.config.scale.max_workers)
            check_trackers(self.config.track)
            digest = settings_digest(self.declared)
            given_up = decide_give_up(read_attempt_history(store), self.config.failure.limits, digest)
            if given_up is not None:
                raise gave_up(name, given_up)
            for path, reason in sorted(store.unreadable.items()):
                self._publish(events.NoteEvent(text=f"unreadable, going on without it: {path}: {reason}"))
            check_round_trip(store.storage, f".doctor/{self.id}/bytes")
            self._publish(events.PhaseEvent(name="data"))
            prepared = prepare(self.config, store.storage, partial(self._encoders, address), like=base.get("data"))
            check_unchanged(base, self.config, prepared.fingerprint)
            check_metric(self.config, prepared.facts)
            model = check_model(self.config, prepared, store.storage)[0]
            static_graph = not base and self._try_model(prepared, model)
            for note in prepared.notes:
                self._publish(events.NoteEvent(text=note))
            store.storage.put(f"{name}/run.yaml", [yaml.safe_dump(dict(self.declared), sort_keys=False).encode()])
            path = f"{store.launch_dir(self.id)}/alive.json"
            liveness = self._liveness = LivenessFile(store.storage, path, digest, self.began)
            record = record_provenance(store, self.config, self.declared, self.id, prepared, self.code)
        train = partial(self._train, prepared, address, liveness, static_graph=static_graph)
        try:
            return record_end(store, self.id, liveness, train)
        finally:
            record.join(RECORD_S)

    @contextlib.contextmanager
    def _encoders(self, address: str | None) -> Iterator[Encoder]:
        with ray_session(address):
            yield partial(encode_on_ray, code=self.code)

    def _try_model(self, prepared: Prepared, model: nn.Module) -> bool:
        """Check the pretrained files, and try the first micro-batch here. Returns whether the model's graph is static.

        A resumed run does not read these files.
        """
        for note in check_pretrained(self.config, prepared, self.store.storage, model):
            self._publish(events.NoteEvent(text=note))
        self._publish(events.PhaseEvent(name="dry_step"))
        found = dry_step(
            self.config,
            prepared,
            self.store.storage,
            model,
            num_workers=self.config.scale.max_workers,
            on_gpu=self.config.scale.gpus_per_worker > 0,
        )
        for note in found.notes:
            self._publish(events.NoteEvent(text=note))
        return found.static_graph

    def _train(
        self, prepared: Prepared, address: str | None, liveness: LivenessFile, *, static_graph: bool
    ) -> Finished:
        plan = make_plan(self.config, prepared.num_samples, self.config.scale.max_workers)
        self._publish(events.PhaseEvent(name="ray", num_steps=plan.num_steps, num_samples=prepared.num_samples))
        with contextlib.ExitStack() as stack:
            is_joined = stack.enter_context(ray_session(address))
            if is_joined and self.host is not None and self.config.failure.survive_driver:
                self._host = stack.enter_context(self.host(self.config, self.id))
            cpus = cpus_per_worker(self.config.scale, is_joined=is_joined)
            preflight(self.config, self._publish)
            assignment = Assignment(
                config=self.config,
                declared=self.declared,
                launch=self.id,
                prepared=prepared,
                num_threads=max(1, int(cpus)),
                static_graph=static_graph,
                code=self.code,
                faults=tuple(self.faults),
                track=self.config.track,
            )
            if self._host is not None:
                return self._host.train(self.config, assignment, cpus, self._publish_body, liveness)
            return train_to_end(self.config, assignment, cpus, self._publish_body)


def train_to_end(
    config: RunConfig, assignment: Assignment, cpus: float, listener: EventListener, stops: Stops = stop_flag
) -> Finished:
    """Run the workers in this process to the launch's end. Arguments and errors are those of `run_workers`."""
    store, launch = config.store, assignment.launch
    try:
        result = run_workers(config, assignment, cpus, listener, stops)
    except RunFailed:
        if _is_superseded(store, launch):  # then the result of its own workers does not count
            return Finished(Outcome.SUPERSEDED, launch)
        raise
    if isinstance(result.get("error"), OutlastError):
        raise result["error"]
    outcome = Outcome(result["outcome"])
    final = find_model(store.fresh()) if outcome is Outcome.DONE else None
    model = _link_model(store, final.path) if final else None
    if outcome is Outcome.STOPPED and _is_superseded(store, launch):
        outcome = Outcome.SUPERSEDED
    elif outcome is Outcome.STOPPED and not build_catalog(store.fresh()).accepted:
        raise KeyboardInterrupt  # a group that has lost a worker cannot save
    return Finished(outcome, launch, model)


def record_end(store: RunStore, launch: str, liveness: LivenessFile, train: Callable[[], Finished]) -> Finished:
    """Run `train`, and record in the liveness file how it ends."""
    exit_code: int | None = None
    message = ""
    try:
        finished = train()
        exit_code = finished.outcome.exit_code
        return finished
    except INTERRUPTIONS:
        if not build_catalog(store.fresh()).accepted:
            exit_code = Interrupted.exit_code
            raise
        exit_code = Outcome.STOPPED.exit_code
        return Finished(Outcome.STOPPED, launch)
    except OutlastError as error:
        exit_code, message = error.exit_code, error.message
        raise
    finally:
        with handle_signals(signal.SIG_IGN):  # an interruption here would lose the exit code
            liveness.end(exit_code, message)


def recorded_end(store: RunStore, launch: str) -> Finished | None:
    """Return how a launch ended by its liveness file, if it is done or stopped. Raises StorageError."""
    alive = read_liveness(store, launch)
    for outcome in (Outcome.DONE, Outcome.STOPPED):
        if alive.get("ended") and alive.get("exit_code") == outcome.exit_code:
            final = find_model(store) if outcome is Outcome.DONE else None
            return Finished(outcome, launch, _link_model(store, final.path) if final else None)
    return None


def _is_superseded(store: RunStore, launch: str) -> bool:
    with contextlib.suppress(StorageError):
        return launch_is_superseded(store, launch)
    return False


@contextlib.contextmanager
def _preflight() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise PreflightError(error.message, hint=error.hint) from error


def _link_model(store: RunStore, model: str) -> str:
    """Return the model's path: `<run>/model`, a link to the attempt's, where the storage has links."""
    if not isinstance(store.storage, LocalStorage):
        return model
    link = store.storage.path(f"{store.run}/model")
    temporary = link.with_name(f".model.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        temporary.symlink_to(Path(model).relative_to(store.run))
        temporary.replace(link)
        return f"{store.run}/model"
    with contextlib.suppress(OSError):
        temporary.unlink()
    return model
