"""Announced losses: when to save because a node is about to be lost.

Ray marks a node as draining and gives a deadline. The first save follows at once, because the notice may be shorter
than promised; the second just before the deadline, because the group trains until then and would repeat those steps.
How long before the deadline depends on how long a save takes.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

MARGIN_S = 3.0
#: The second save may take this many times as long as the first: other runs save to the same storage at such times.
SAVE_TIME_FACTOR = 1.5


@dataclass(slots=True)
class PreemptionWatch:
    """Decides when to save, for one attempt."""

    nodes: Collection[str]  #: those that the attempt's workers are on
    margin_s: float = MARGIN_S  #: how long before the deadline the second save begins, if it takes no time
    save_s: float = 0.0  #: how long the newest save since the notice took, from its beginning to its commit
    _noticed: set[str] = field(default_factory=set)
    _last_saves: set[str] = field(default_factory=set)

    def check(self, draining: Mapping[str, float], now: float | None = None) -> str | None:
        """Return why to save at `now`, or None. `draining` is what `ray_internals.draining_nodes` returns."""
        now = time.time() if now is None else now
        ours = {node: deadline for node, deadline in draining.items() if node in self.nodes}
        if new := ours.keys() - self._noticed:
            self._noticed |= new
            self.save_s = 0.0  # the save that follows measures the storage as it is now
            return "a node is about to be lost"
        margin_s = self.margin_s + SAVE_TIME_FACTOR * self.save_s
        due = {node for node, deadline in ours.items() if deadline and now >= deadline - margin_s}
        if due := due - self._last_saves:
            self._last_saves |= due
            return "a node's last seconds"
        return None
