"""Callback for `transformers.Trainer`: its own checkpoints are sealed, and a resume uses undamaged ones only.

    trainer = Trainer(…, callbacks=[SealCheckpoints()])
    trainer.train(resume_from_checkpoint=newest_sealed(args.output_dir))

Trainer itself resumes from the checkpoint with the highest number, damaged or not, and never calls fsync. This adds a
manifest, verification, fallback and fsync. It does not add what only outlast's own loop has: fencing of zombies, and
checkpoints without pickles.
"""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import checkpoint_name
from outlast.checkpointing.hf_trainer_seals import newest_sealed, seal

__all__ = ["SealCheckpoints", "newest_sealed"]


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint that Trainer saves.

    Trainer calls `on_save` on every process after that process has written its own files, without a barrier: process 0
    may arrive before the others have written their `rng_state_N.pth`. So all processes wait for each other here, and
    then the process that writes checkpoints (`args.should_save`) makes the files durable and seals them. `output_dir`
    must be one directory that all processes see, or one for each node with `save_on_each_node`. A seal covers the files
    in the directory at that moment, so add this callback after others that write into it.

    Checkpoints that Trainer saves without `on_save`, such as those of `enable_jit_checkpoint`, are not sealed and are
    skipped at the next start. With `save_total_limit` Trainer deletes old checkpoints before the new one is sealed;
    with three or more, an undamaged one remains even if another is damaged.

    Raises:
        ConfigError: When training begins, if `save_total_limit` is 1.
        StorageError: When a checkpoint cannot be sealed.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_total_limit == 1:
            raise ConfigError(
                "save_total_limit=1 deletes the only sealed checkpoint before the next one is sealed",
                hint="set save_total_limit to 3, or at least to 2",
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if args.should_save:
            seal(Path(args.output_dir) / checkpoint_name(state.global_step), world_size=args.world_size)
