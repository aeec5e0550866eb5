"""A task whose module cannot be imported while the file that `OUTLAST_TEST_BLOCKED_BY` names exists."""

from __future__ import annotations

import os
import time
from pathlib import Path

from outlast.trainers.tasks.causal_lm import CausalLM

BLOCKED_BY = "OUTLAST_TEST_BLOCKED_BY"

while Path(os.environ.get(BLOCKED_BY, "/never/there")).exists():
    time.sleep(0.1)


class Blocked(CausalLM):
    """Predicts the next token."""
