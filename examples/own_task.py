"""A task of one's own: two classes, and a weight for each row, by which its loss counts.

    outlast train examples/own_task.yaml
    outlast try examples/own_task.yaml --text "well done"

The run file names it as `task: own_task:Weighted`; Python finds it because it lies beside the run file.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from outlast.trainers import Column, ColumnType, Task


class Weighted(Task):
    auto_class = "AutoModelForSequenceClassification"
    columns = (
        Column("text", ColumnType.TEXT),
        Column("label", ColumnType.VALUE, is_target=True),
        Column("weight", ColumnType.VALUE, is_target=True),
    )
    targets = ("labels", "weights")  # what the model is not given

    def encode(self, records):
        """A sample for each row: named vectors, of whole numbers or of fractions."""
        for record in records:
            tokens = self.tokenizer.inner(record["text"], truncation=True, max_length=self.settings.max_length)
            sample = {"input_ids": np.array(tokens["input_ids"], dtype=np.int32)}
            if "label" in record:  # `outlast try` has no targets
                sample["labels"] = np.array([int(record["label"])], dtype=np.int32)
                sample["weights"] = np.array([float(record["weight"])], dtype=np.float32)
            yield sample

    def loss(self, outputs, batch):
        """A sum, never a mean: outlast divides by the count of the whole step (`count`: by default the rows)."""
        losses = functional.cross_entropy(outputs.logits.float(), batch["labels"].flatten(), reduction="none")
        return (losses * batch["weights"].flatten()).sum()

    # Without what follows it trains; with it there are scores, and answers to `outlast try`.

    @classmethod
    def score_names(cls, facts):
        return ("accuracy",)

    def tally(self, outputs, batch):
        """Sums over a batch, which are added up over all of them; here of rows that are right."""
        return {"right": (outputs.logits.argmax(-1) == batch["labels"].flatten()).sum()}

    def scores(self, sums):
        return {"accuracy": (sums["right"] / sums["count"]).item()}

    def decode(self, outputs, batch, records):
        for record, share in zip(records, torch.softmax(outputs.logits.float(), -1)[:, 1].tolist(), strict=True):
            yield {"text": record["text"], "label": int(share > 0.5), "probability": share}
