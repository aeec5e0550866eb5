"""Setup hook of Ray worker processes: imports the attempt's modules as soon as the process starts.

It must never raise: Ray then starts no worker at all.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress

from outlast.cluster.driver.warm_standby import PREWARM_VARIABLE


def warm() -> None:
    """Import what a worker process will need. Ray calls it first in every process."""
    import outlast.cluster.driver.worker  # noqa: F401
    from outlast.trainers.prewarm import prewarm

    task, model_type = json.loads(os.environ[PREWARM_VARIABLE])
    if task:
        with suppress(Exception):  # the attempt itself raises the error
            prewarm(task, model_type)
