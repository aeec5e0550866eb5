"""A save and a restore look through the model once each, however much they need of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.train_state import TrainState
from outlast.checkpointing.storage.local import LocalStorage


class Counted(nn.Linear):
    """Counts how often its weights are listed."""

    num_listed = 0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.num_listed += 1
        return super().state_dict(*args, **kwargs)


def test_names_are_computed_once_for_a_save_and_once_for_a_restore(tmp_path: Path) -> None:
    for launch, step in (("first", 1), ("second", 20)):
        model = Counted(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        saver = Checkpointer(LocalStorage(tmp_path), "run", launch=launch)
        assert (saver.resume(model, optimizer) is None) is (step == 1)
        assert model.num_listed == 1
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        assert saver.save(step, model, optimizer, {"step": step})
        assert model.num_listed == 2
        assert saver.async_save(step + 10, model, optimizer, {"step": step + 10})
        assert saver.wait()
        assert model.num_listed == 3


def test_each_rank_writes_its_part_and_together_they_write_all() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = TrainState(model, optimizer)
    moments = [state.moments_to_write(rank, 3) or {} for rank in range(3)]
    assert [len(state.weights_to_write(rank)) for rank in range(3)] == [len(state.specs), 0, 0]
    assert sum(map(len, moments)) == len({name for part in moments for name in part}) == 3 * 4
    assert state.changed_by_forward(state.weights) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert TrainState(model, None).moments_to_write(0, 3) is None


def test_a_restore_without_an_optimizer_reads_its_state_and_drops_it(tmp_path: Path) -> None:
    model = Counted(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert Checkpointer(LocalStorage(tmp_path), "run").save(1, model, optimizer, {"step": 1})
    assert Checkpointer(LocalStorage(tmp_path), "run", launch="b").resume(Counted(3, 2)) == {"step": 1}
    with pytest.raises(ConfigError, match="weights of another model"):
        Checkpointer(LocalStorage(tmp_path), "run", launch="c").resume(Counted(3, 3))
