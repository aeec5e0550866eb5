"""`outlast report`: one page of HTML about a run, which holds all that it shows and fetches nothing.

The data goes in as JSON in which no `<` is left, and the page shows text as text; so nothing that a run is named, or
that an error says, can become HTML. Charts are drawn by uPlot (github.com/leeoniya/uPlot, MIT), which lies beside.
"""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from outlast.checkpointing.run_store.deletion import list_pins
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.tools.query import load_catalog
from outlast.checkpointing.tools.verify_run import verify_run
from outlast.cluster.formatting import finite
from outlast.cluster.monitoring.report.data import page_data
from outlast.cluster.monitoring.run_summary import summarize
from outlast.cluster.monitoring.timeline_reader import TimelineReader

_PLACES = re.compile(r"\{\{([A-Za-z.]+)\}\}")
_HEIGHT_PX = 900


@dataclass(frozen=True, slots=True)
class Report:
    """A report on a run at one moment. In a notebook it shows itself."""

    data: Mapping[str, Any]

    @classmethod
    def of(cls, storage: Storage, run: str, *, verify: bool = False) -> Report:
        """As `read`, of a run by its name."""
        return cls.read(RunStore(storage, run), verify=verify)

    @classmethod
    def read(cls, store: RunStore, *, verify: bool = False) -> Report:
        """Reads a run.

        Args:
            store: The run.
            verify: Read every byte of every checkpoint first.

        Raises:
            ConfigError: There is no such run.
            StorageError: The storage could not be read.
        """
        story = TimelineReader(store).look()
        catalogue = None if story.is_new else load_catalog(store)
        verdicts = verify_run(store) if verify and catalogue else None
        accepted = catalogue.accepted if catalogue else ()
        names = {item.ref: store.checkpoint_url(item.ref) for item in accepted}
        seen = summarize(story, time.time())
        data = page_data(story, seen, catalogue, list_pins(store), verdicts, names)
        return cls({**data, "version": _version()})

    def to_html(self) -> str:
        """The page."""
        parts = {"data": _in_script(self.data)}

        def part(match: re.Match[str]) -> str:
            name = match[1]
            return parts[name] if name in parts else files(__package__).joinpath(name).read_text(encoding="utf-8")

        return _PLACES.sub(part, files(__package__).joinpath("report.html").read_text(encoding="utf-8"))

    def _repr_html_(self) -> str:
        """In a frame, so that neither the notebook's style nor the page's reaches the other."""
        page = html.escape(self.to_html(), quote=True)
        style = f"width:100%;height:{_HEIGHT_PX}px;border:0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'


def run_report(run: str, storage: str = "./runs", *, verify: bool = False) -> Report:
    """A report for a notebook: make it the last line of a cell.

    Args:
        run: A run's directory, URI, run file, or name under `storage`.
        storage: Where runs named by name lie.
        verify: Read every byte of every checkpoint first.

    Raises:
        ConfigError: There is no such run.
        StorageError: The storage could not be read.
    """
    from outlast.cluster.config.run_reference import find_run

    store, _ = find_run(str(run), storage)
    return Report.read(store, verify=verify)


def _version() -> str:
    try:
        return version("outlast")
    except PackageNotFoundError:  # sent along to a cluster, and not installed there
        return ""


def _in_script(data: Mapping[str, Any]) -> str:
    """JSON that nothing in a script element can mistake for its end, or for a comment."""
    text = json.dumps(finite(data), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
