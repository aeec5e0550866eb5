"""The job of `recovery.py`'s other peer: `transformers.Trainer` with DDP, started again by a loop whenever it ends.

    python recovery_trainer.py FOLDER STEPS EVERY

Two ranks under torchrun. On the way back Trainer takes its newest checkpoint (`resume_from_checkpoint=True`), whose
files are flushed to disk here, as it does not do itself. Rank 0 appends a line for each step to `FOLDER/steps.txt`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKER = "RECOVERY_TRAINER_WORKER"
PLACE = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]  # a free port


def train(folder: Path, steps: int, every: int) -> None:
    """One attempt of one rank."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                with (folder / "steps.txt").open("a") as log:
                    print(time.time(), state.global_step, file=log)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for path in (folder / f"checkpoint-{state.global_step}").glob("*"):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    (folder / f"rank-{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=400)
    generator = torch.Generator().manual_seed(11)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(400, (4096, 16), generator=generator)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=every,
        save_total_limit=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(AutoModelForCausalLM.from_config(config), arguments, train_dataset=rows, callbacks=[Note()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) is not None)


def main() -> None:
    """The loop."""
    folder, steps, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if WORKER in os.environ:
        train(folder, steps, every)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *PLACE, *sys.argv]
    while subprocess.run(command, env={**os.environ, WORKER: "1", "OMP_NUM_THREADS": "1"}).returncode:
        pass


if __name__ == "__main__":
    main()
