"""The example's Trainer, in a process that can be killed in the middle of a save.

Arguments: the directory, `plain` or `sealed`, the number of steps, and the step whose save comes to a halt (0: none).
"""

from __future__ import annotations

import io
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from outlast.trainers.hf_trainer_seal_callback import SealCheckpoints, newest_sealed

EXAMPLE = Path(__file__).parents[2] / "examples" / "hf_trainer.py"
real_save = torch.save


def save_half(folder: Path, step: int) -> None:
    """The optimizer's file of one step is written in part, which a file `midway` tells; then nothing more happens."""

    def save(value: Any, path: str) -> None:
        if path != str(folder / f"checkpoint-{step}" / "optimizer.pt"):
            return real_save(value, path)
        buffer = io.BytesIO()
        real_save(value, buffer)
        Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        (folder / "midway").touch()
        while True:
            signal.pause()

    torch.save = save  # type: ignore[assignment]


class Tells(TrainerCallback):
    """Leaves a file when process 0 has saved and is about to seal."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir, f"saved-{state.global_step}").touch()


def save_late(trainer: Trainer, folder: Path) -> None:
    """The generator state of process 1 is written only when process 0 is about to seal."""

    def save(value: Any, path: str) -> None:
        if path.endswith("rng_state_1.pth"):
            while not (folder / f"saved-{trainer.state.global_step}").exists():
                time.sleep(0.01)
        real_save(value, path)

    torch.save = save  # type: ignore[assignment]


def main() -> None:
    folder, kind, steps, halt = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    trainer: Trainer = runpy.run_path(str(EXAMPLE))["make_trainer"](str(folder), steps)
    if halt:
        save_half(folder, halt)
    elif trainer.args.world_size > 1:
        seals = trainer.pop_callback(SealCheckpoints)
        trainer.add_callback(Tells)
        trainer.add_callback(seals)
        save_late(trainer, folder)
    if kind == "plain":
        trainer.remove_callback(SealCheckpoints)
    trainer.train(resume_from_checkpoint=True if kind == "plain" else newest_sealed(folder))


if __name__ == "__main__":
    main()
