"""Setup hook of Ray worker processes: imports ahead of need."""

from __future__ import annotations

import json
import os
from contextlib import suppress

from outlast.cluster.driver.warm_standby import _PREWARM


def warm() -> None:
    """What every worker process does first: the imports that it will need."""
    import outlast.cluster.driver.worker  # noqa: F401
    from outlast.trainers.prewarm import prewarm

    task, model_type = json.loads(os.environ[_PREWARM])
    if task:
        with suppress(Exception):  # the attempt itself will say so; what is raised here lets no worker start at all
            prewarm(task, model_type)
