"""A training loop of your own that outlasts its process: no Ray, no Hugging Face, `Checkpointer` and torch.

    python examples/own_loop.py [--steps 300] [--save-every 20] [--storage runs]
    torchrun --nproc-per-node 2 examples/own_loop.py

A small transformer learns to write like Python's own help, byte by byte; about 10 s on one core. Kill it at any moment
with whatever signal you like and run it again: it goes on behind its newest whole checkpoint, and ends with the same
bits as if nothing had happened. Start it twice, and the older one ends by itself with exit code 75.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from outlast.checkpointing import Checkpointer, open_storage

SEED = 7
BATCH, LENGTH, WIDTH = 16, 64, 64
SUPERSEDED = 75  # EX_TEMPFAIL: somebody newer carries on; nothing is wrong


class Writer(nn.Module):
    """Bytes to the logits of the next byte: one causal transformer layer, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True)
        self.out = nn.Linear(WIDTH, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.byte(text) + self.place.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.out(self.layer(hidden, src_mask=mask, is_causal=True))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, text: torch.Tensor, lr: float) -> float:
    """One update; this rank's loss."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH // size,))
    windows = text[starts[:, None] + torch.arange(LENGTH + 1)]
    loss = functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    if size > 1:  # by hand: DDP adds in another order after a restart, which shows in the last bits from 3 ranks on
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
    for group in optimizer.param_groups:  # follows from the step, as all else
        group["lr"] = lr
    optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--storage", default="runs", help="a directory, or s3://bucket/prefix")
    options = parser.parse_args()

    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
    torch.set_num_threads(1)  # sums depend on how many threads share them: the same number at every start
    torch.manual_seed(SEED)
    text = torch.tensor(list("\n".join(map(str, pydoc_data.topics.topics.values())).encode()))
    model = Writer()
    optimizer = torch.optim.AdamW(model.parameters())

    with Checkpointer(open_storage(options.storage), "own-loop") as checkpointer:
        state = checkpointer.resume(model, optimizer)
        if checkpointer.superseded:
            raise SystemExit(SUPERSEDED)
        rank, size = checkpointer.ranks.rank, checkpointer.ranks.size
        say = partial(print, flush=True) if rank == 0 else lambda line: None
        first = state["step"] if state else 0
        say(f"from step {first}")
        for step in range(first, options.steps):
            # Which samples come and what dropout drops follow from (seed, step) alone. A generator that is seeded once
            # stands elsewhere after a resume than in a run that was never killed, and the two would end differently.
            torch.manual_seed(SEED * 1_000_003 + step * size + rank)
            loss = train_step(model, optimizer, text, lr=3e-3 * (1 - step / options.steps))
            done = step + 1
            if done % options.save_every == 0 or done == options.steps:
                # In the background, but for the last one, which is waited for.
                save = checkpointer.save if done == options.steps else checkpointer.async_save
                if not save(done, model, optimizer, {"step": done}, metrics={"loss": loss}):
                    raise SystemExit(SUPERSEDED)
                say(f"step {done:4}  loss {loss:.3f}")
        model_dir = checkpointer.finish(checkpointer.accepted[0].ref, options.steps)
        if model_dir is None:
            raise SystemExit(SUPERSEDED)
        say(f"done at step {options.steps}; the weights lie in {options.storage}/{model_dir}")


if __name__ == "__main__":
    main()
