"""What a process of the sweep does: save a pretrained model, check a run's settings, run an attempt.

Everything but `save_pretrained` and the reading of what transformers reads goes through outlast's own functions.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.state.optimizer_state import optimizer_tensors
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers import attempt
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.checks.dry_step import dry_step
from outlast.trainers.checks.model_checks import check_architecture, check_code, check_metric, check_model
from outlast.trainers.config.train import Parallel
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.train_loop import Loop
from outlast.trainers.tasks.base import Task, find_task
from tests.support.architectures.configurations import TABLES
from tests.support.groups.worker_group import Quiet

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PRETRAINING = ("causal-lm", "masked-lm", "seq2seq-lm")


def save_pretrained(folder: str, given: dict[str, Any], task: str, tokenizer_folder: str) -> None:
    """Save a model of plain transformers, with the head it would be pretrained with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **given})
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    if task in ("sequence-classification", "token-classification"):
        config.num_labels = 2  # as the rows have; some types have another number by default
    model = _with_head(config, task)
    model.save_pretrained(folder)
    for path in Path(tokenizer_folder).iterdir():
        (Path(folder) / path.name).write_bytes(path.read_bytes())


def _with_head(config: Any, task: str) -> Any:
    """A model with the head it would be pretrained with; with the task's own, if no other can be had."""
    pretraining = [name for name in PRETRAINING if config.model_type in TABLES[name]]
    for name in [task] if task in pretraining else [*pretraining[:1], task]:
        torch.manual_seed(5)
        try:
            model = getattr(transformers, find_task(name).auto_class).from_config(config)
        except (AssertionError, ValueError):  # Reformer's decoder must be configured as one
            if name == task:
                raise
            continue
        if name == task or model.config.model_type == config.model_type:  # else it is a part with a type of its own
            return model
    raise AssertionError(task)


def check(assignment: Assignment, url: str, num_workers: int) -> bool:
    """Check a run as `train` does before it starts workers. Returns whether the model's graph is static."""
    config, prepared, storage = assignment.config, assignment.prepared, LocalStorage(Path(url))
    check_code(config)
    check_architecture(config)
    check_metric(config, prepared.facts)
    model, _ = check_model(config, prepared, storage)
    return dry_step(config, prepared, storage, model, num_workers=num_workers, on_gpu=False).static_graph


class Kept(Loop):
    """The loop, which the test can look into once it has ended."""

    last: Loop | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        Kept.last = self


def train(assignment: Assignment, url: str, control: Quiet, *, reload: bool) -> dict[str, Any]:
    """Run an attempt. Returns its outcome, digests of the rank's state, and how a reloaded model differs."""
    setattr(attempt, "Loop", Kept)  # noqa: B010 - the name is private to the module
    Kept.last = None
    world = World()
    outcome = run_attempt(assignment, LocalStorage(Path(url)), world, control)
    loop: Any = Kept.last
    found: dict[str, Any] = {"outcome": outcome.value, "digests": digests(loop.model, loop._train_step.optimizer)}
    if reload and world.rank == 0:
        sharded = assignment.config.scale.parallel is Parallel.FSDP and world.size > 1
        folder = next(Path(url).glob(f"{assignment.config.name}/attempts/*/checkpoint-{loop.step}"))
        try:
            found["reload"] = compare_reloaded(folder, loop, None if sharded else loop.model)
        except Exception as error:  # noqa: BLE001 - it is the finding
            found["reload"] = [f"{type(error).__name__}: {str(error).strip()[:300]}"]
    return found


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """SHA-256 of every parameter, buffer and optimizer tensor, as this rank holds them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **optimizer_tensors(model, optimizer)}
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: torch.Tensor) -> str:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    data = local.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"{local.dtype}{list(local.shape)}".encode() + data.tobytes()).hexdigest()[:16]


def compare_reloaded(folder: Path, loop: Loop, model: Any) -> list[str]:
    """Compare a checkpoint with what transformers reads from it and would write. Returns the differences."""
    task, found = loop.task, list[str]()
    loaded, info = getattr(transformers, task.auto_class).from_pretrained(folder, output_loading_info=True)
    found += [f"{kind}: {sorted(map(str, names))[:3]}" for kind, names in info.items() if names]
    with tempfile.TemporaryDirectory() as place:
        (model if model is not None else loaded).save_pretrained(place)
        theirs, ours = load_all(Path(place)), load_all(folder)
        again = getattr(transformers, task.auto_class).from_pretrained(place)
    if theirs.keys() != ours.keys():
        more, fewer = sorted(ours.keys() - theirs.keys())[:3], sorted(theirs.keys() - ours.keys())[:3]
        found.append(f"file keys: only ours {more}, only save_pretrained's {fewer}")
    unequal = [name for name in theirs if name in ours and not torch.equal(theirs[name], ours[name])]
    if unequal and model is not None:  # a resume shows the values of a sharded one
        found.append(f"file values: {unequal[:3]}")
    if model is not None:
        for item in (loaded, again):  # else a row times a matrix may give other bits, at the addresses of the file
            for tensor in (*item.parameters(), *item.buffers()):
                tensor.data = tensor.data.clone()
        mine, other, plain = (logits(item, task, loop) for item in (model, loaded, again))
        # Reading a Funnel zeroes the padding token's row, which tied weights train: so does a plain round trip.
        if not any(all(torch.equal(given[name], other[name]) for name in mine) for given in (mine, plain)):
            found.append("logits differ after from_pretrained")
    return found


def load_all(folder: Path) -> Mapping[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(model: Any, task: Task, loop: Any) -> dict[str, torch.Tensor]:
    samples = loop._train_step._data.take(list(range(loop.config.train.micro_batch)))
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = task.forward(model.eval(), task.collate(samples, [1] * len(samples)))
    return {name: outputs[name].clone() for name in ("logits", "start_logits", "end_logits") if name in outputs}


def losses(url: str, run: str) -> dict[int, list[float]]:
    """The losses of every step; one, if a step that was done twice had the same one."""
    found: dict[int, list[float]] = {}
    for event in events(url, run, "step"):
        known = found.setdefault(event["step"], [])
        known += [event["loss"]] if event["loss"] not in known else []
    return found


def events(url: str, run: str, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, of all attempts."""
    found = run_events(RunStore(LocalStorage(Path(url)), run))
    return [event for _, event in found if event["event"] == kind]
