"""Keep `transformers.Trainer`, and resume only from checkpoints that are proven whole.

    python examples/hf_trainer.py [--steps 60] [--dir hf-trainer]

A small GPT-2 learns to write like Python's own help, byte by byte; a few seconds on one core. Kill it at any moment,
also while it saves, and run it again: Trainer goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from outlast.checkpointing import newest_sealed
from outlast.trainers import SealCheckpoints

LENGTH = 64


def make_trainer(output_dir: str, steps: int) -> Trainer:
    set_seed(7)
    size = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    text = "\n".join(map(str, pydoc_data.topics.topics.values())).encode()
    windows = [list(text[start : start + LENGTH]) for start in range(0, len(text) - LENGTH, LENGTH)]
    args = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_steps=10,
        save_total_limit=3,
        logging_steps=5,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"input_ids": window, "labels": window} for window in windows]
    return Trainer(model=model, args=args, train_dataset=data, callbacks=[SealCheckpoints()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dir", default="hf-trainer")
    options = parser.parse_args()
    trainer = make_trainer(options.dir, options.steps)
    newest = newest_sealed(options.dir)
    done = newest is not None and newest.endswith(f"checkpoint-{options.steps}")
    if not done:  # from its last step Trainer would do one step more
        trainer.train(resume_from_checkpoint=newest)
    print(f"done at step {options.steps}; the checkpoints lie in {options.dir}")


if __name__ == "__main__":
    main()
