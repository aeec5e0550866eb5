"""The report of a run: one self-contained HTML page that fetches nothing.

The data is embedded as JSON without any `<`, and the page inserts text as text only, so no run name and no error
message can become HTML. Charts are drawn by uPlot (github.com/leeoniya/uPlot, MIT), stored in this folder.
"""

from __future__ import annotations

import html
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from outlast.checkpointing.redaction import redact_json
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.location import Location
from outlast.checkpointing.tools.query import load_catalog, readable_pins, verify_run
from outlast.cluster.formatting import finite
from outlast.cluster.monitoring.report.page_data import page_data
from outlast.cluster.monitoring.status import take_snapshot
from outlast.cluster.monitoring.timeline import TimelineReader

_PLACEHOLDERS = re.compile(r"\{\{([A-Za-z.]+)\}\}")
_HEIGHT_PX = 900


@dataclass(frozen=True, slots=True)
class Report:
    """A report on a run at one moment. A notebook displays it."""

    data: Mapping[str, Any]

    @classmethod
    def of(cls, storage: Storage | Location, run: str, *, verify: bool = False) -> Report:
        """Read a run by its name, as `read` does."""
        return cls.read(RunStore(storage, run), verify=verify)

    @classmethod
    def read(cls, store: RunStore, *, verify: bool = False) -> Report:
        """Read a run; with `verify`, every byte of every checkpoint first. Raises as `run_report`."""
        timeline = TimelineReader(store).update()
        catalog = None if timeline.is_unclaimed else load_catalog(store)
        verdicts = verify_run(store) if verify and catalog else None
        urls = {item.ref: store.checkpoint_url(item.ref) for item in (catalog.accepted if catalog else ())}
        data = page_data(timeline, take_snapshot(timeline, time.time()), catalog, readable_pins(store), verdicts, urls)
        return cls(redact_json({**data, "version": _version()}))

    def to_html(self) -> str:
        """Render the page."""

        def content(match: re.Match[str]) -> str:
            return _in_script(self.data) if match[1] == "data" else _file(match[1])

        return _PLACEHOLDERS.sub(content, _file("report.html"))

    def _repr_html_(self) -> str:
        """Render the page in a frame, which keeps its style and the notebook's apart."""
        page = html.escape(self.to_html(), quote=True)
        style = f"width:100%;height:{_HEIGHT_PX}px;border:0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'


def run_report(run: Location, storage: Location = "./runs", *, verify: bool = False) -> Report:
    """Return a report for a notebook; make it the last line of a cell.

    Args:
        run: A run's directory, URI, run file, or name under `storage`.
        storage: The storage root for runs given by name.
        verify: Read every byte of every checkpoint first.

    Raises:
        ConfigError: There is no such run.
        StorageError: The storage could not be read.
    """
    from outlast.cluster.config.run_reference import find_run

    store, _ = find_run(os.fspath(run), os.fspath(storage))
    return Report.read(store, verify=verify)


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _version() -> str:
    try:
        return version("outlast")
    except PackageNotFoundError:  # on a cluster that received the package as a working directory
        return ""


def _in_script(data: Mapping[str, Any]) -> str:
    """Serialize to JSON that cannot end or comment out the surrounding script element."""
    text = json.dumps(finite(data), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
