"""A task that makes 4 MiB of samples of every row, so that few rows are a large object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.tasks.base import Record
from outlast.trainers.tasks.causal_lm import CausalLM

NUM_TOKENS = 2**20


class Bulky(CausalLM):
    """Predicts nothing worth knowing."""

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for record in records:
            yield {"input_ids": np.full(NUM_TOKENS, len(record["text"]), np.int32)}
