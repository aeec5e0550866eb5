"""The log of a job as it grows: what is new comes through the server's stream; without one, as behind a proxy, the
whole log is read now and then."""

import asyncio
import time
from dataclasses import dataclass

import aiohttp

from outlast.checkpointing.errors import PreflightError
from outlast.cluster.jobs import ray_jobs as jobs
from outlast.cluster.jobs.job_server import JobServer
from outlast.cluster.jobs.ray_jobs import SubmittedJob
from outlast.cluster.output import print_log

_CHECK_S = 5.0
_PAUSE_S = 1.0


@dataclass(slots=True)
class _Printer:
    """Prints a log to stderr, each part once and in whole lines: a part of a credential is not recognised."""

    num_received: int = 0
    _rest: str = ""

    def add(self, text: str) -> None:
        self.num_received += len(text)
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            print_log(f"{lines}\n", to_stderr=True)

    def end(self) -> None:
        print_log(self._rest, to_stderr=True)


def follow(client: JobServer, job_id: str) -> SubmittedJob:
    """Print the job's log to stderr as it grows, until the job ends. Raises PreflightError if the server is lost."""
    printer, has_stream = _Printer(), not client.has_proxy  # the stream of Ray's client ignores proxies
    while True:
        try:
            job = jobs.find_job(client, job_id)
            if has_stream:
                before = printer.num_received
                try:
                    asyncio.run(_follow_stream(client, job_id, printer))
                    job = jobs.find_job(client, job_id)
                except (aiohttp.ClientError, TimeoutError, RuntimeError):
                    has_stream = printer.num_received > before
                    continue
            else:
                printer.add(client.get_job_logs(job_id)[printer.num_received :])
        except (PreflightError, RuntimeError, OSError) as error:
            raise PreflightError(
                f"the cluster does not answer, or does not know job {job_id}",
                hint="the checkpoints are in the run's storage: submit the run on any cluster to resume it; but with "
                "failure.survive_head it may still be running (see `outlast status`): then wait for the head",
            ) from error
        if not job.is_live:
            printer.end()
            return job
        time.sleep(_PAUSE_S if has_stream else _CHECK_S)


async def _follow_stream(client: JobServer, job_id: str, printer: _Printer) -> None:
    """Print what is new in the log until the server ends the stream. Raises if it or the server is lost."""
    to_skip = printer.num_received  # a stream begins at the begin of the log
    stream = client.tail_job_logs(job_id)
    while True:
        part = asyncio.ensure_future(anext(stream))
        while not part.done():
            await asyncio.wait({part}, timeout=_CHECK_S)
            if not part.done():
                jobs.find_job(client, job_id)  # a lost server does not end the stream
        try:
            text = part.result()
        except StopAsyncIteration:
            return
        printer.add(text[to_skip:])
        to_skip = max(0, to_skip - len(text))
