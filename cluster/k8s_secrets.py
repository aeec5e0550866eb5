"""Credentials that are written down where they should only be named. Pure; nothing here repeats a value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.k8s_shapes import Complaint, containers, variables

_SECRET = re.compile(r"(SECRET|PASSWORD|TOKEN|ACCESS_KEY|API_KEY|CREDENTIAL)", re.IGNORECASE)


def secrets_written_down(job: Mapping[str, Any]) -> Iterator[Complaint]:
    """Credentials whose value stands in the manifest."""
    for where, container in containers(job):
        for name, value in variables(container).items():
            if value and _SECRET.search(name) and "PATH" not in name.upper():
                yield where, f"{name} is written down; name a secret instead (envFrom, or valueFrom.secretKeyRef)"
