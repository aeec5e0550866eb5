"""The environment of an embedded Ray: only this machine reaches it, and only with a random token.

The token is nowhere but in the environment of Ray's processes, which other users cannot read.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator

from outlast.cluster import ray_internals

_VARIABLES = {
    "RAY_AUTH_MODE": "token",
    # Ray's name for the choice of the address it listens on: 0 is the loopback, on any system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Its metrics have no authentication, and would be on fixed ports.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


@contextlib.contextmanager
def embedded_ray_environment() -> Iterator[None]:
    """Set the variables for a Ray that is started in the body, and its processes; afterwards, restore the user's."""
    variables = {**_VARIABLES, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    ray_internals.reload_environment()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        ray_internals.reload_environment()
