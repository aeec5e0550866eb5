"""The dry step: the first micro-batch, forward and backward, on the host, before any worker is started.

It finds what else only the first step shows, such as a token that the embedding lacks or a head whose logits do not fit
the labels, and which parameters get no gradient. It changes nothing: the model is built for it, and dropped.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.save.staging import free_bytes
from outlast.checkpointing.state.named_weights import unwrap
from outlast.checkpointing.storage.base import Storage
from outlast.trainers.config.train import Exactness, Parallel
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.distributed.determinism import make_deterministic, seed_everything
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.buffer_change_check import tensor_digest, watch_buffers
from outlast.trainers.loop.compile_and_recompute import enable_recomputing
from outlast.trainers.models.build import build_model
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import Batch, Task, find_task
from outlast.trainers.tasks.model_inputs import base_model
from outlast.trainers.user_code import describe_error

#: Floating-point operations that a dry step may take: about half a minute on two cores.
MAX_OPERATIONS = 2e12
#: Share of the largest logit by which logits may differ for other reasons than a token that they depend on.
MAX_LEAK = 1e-4
#: Words of errors that may come from the host having no GPU.
_NEEDS_GPU = re.compile(r"cuda|triton|\bgpu|flash|not implemented", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DryStep:
    """What a dry step found.

    Attributes:
        static_graph: Whether every trained parameter gets a gradient from every micro-batch, as far as is known.
        unused: Trained parameters without a gradient.
        skipped: Why there was no dry step; empty if there was one.
    """

    static_graph: bool = False
    unused: tuple[str, ...] = ()
    skipped: str = ""


def dry_step(
    config: TrainingConfig, prepared: Prepared, storage: Storage, meta: nn.Module, *, num_workers: int, on_gpu: bool
) -> DryStep:
    """Run the first micro-batch of a run twice, and the second forward only; with fewer samples if that takes long.

    Args:
        config: The settings.
        prepared: The prepared data.
        storage: Holds it.
        meta: The model without memory, from `check_model`; a large one is not run here.
        num_workers: The largest number of workers.
        on_gpu: Whether the workers have GPUs: then errors that may come from their lack here are not raised.

    Raises:
        ConfigError: The step fails, or trains nothing, or changes the model in a way that a resume cannot repeat.
    """
    num_parameters = sum(parameter.numel() for parameter in meta.parameters())
    longest = max(prepared.longest.values(), default=1)
    max_samples = int(MAX_OPERATIONS / (6 * max(1, num_parameters * longest)))
    if not max_samples or 16 * num_parameters > free_bytes() // 2:
        return DryStep(skipped=f"a model of {num_parameters:,} parameters is too large for this machine")
    tokenizer = prepared.tokenizer(storage)
    task = find_task(config.model.task)(config.data, tokenizer, prepared.facts)
    model = build_model(config.model, task, tokenizer, config.seed, fresh=True)[0].train()
    plan, samples = make_plan(config, prepared.num_samples, 1), prepared.split(storage, "train")
    batches = [
        task.collate(samples.take(plan.samples(positions[:max_samples])), plan.keys(positions[:max_samples]))
        for positions in plan.cut(plan.positions(0))[:2]
    ]
    if config.train.gradient_checkpointing:
        enable_recomputing(model)
    will_shard = config.scale.parallel is Parallel.FSDP and num_workers > 1
    recomputes = config.train.gradient_checkpointing
    guards = watch_buffers(model, config.exactness, recomputes=recomputes, will_shard=will_shard)
    modules = dict(model.named_modules())
    try:
        used = _run(config, model, task, batches)
    except OutlastError:
        raise
    except Exception as error:
        if on_gpu and _NEEDS_GPU.search(str(error)):
            return DryStep(skipped=f"it needs a GPU: {describe_error(error)}")
        raise ConfigError(
            f"the first micro-batch fails in {type(unwrap(model)).__name__}: {describe_error(error)}",
            hint="check that `model:`, its tokenizer and `data:` belong together",
        ) from error
    for guard in guards:
        guard.check()
    _check_modules(modules, model)
    if task.auto_class == "AutoModelForCausalLM" and _is_of_libraries(model, task):
        _check_no_lookahead(model, task, batches[0])
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    unused = tuple(name for name, parameter in trained if parameter.grad is None)
    if len(unused) == len(trained):
        raise ConfigError("no parameter gets a gradient from the loss", hint="check the loss of the task, and freezing")
    has_nested_backward = any(parameter.grad is not None and parameter not in used for _, parameter in trained)
    if has_nested_backward and unused and num_workers > 1 and _uses_ddp(config):
        raise ConfigError(
            f"{type(unwrap(model)).__name__} runs backward passes within its backward pass, and {unused[0]} gets no "
            "gradient; DDP does not support both",
            hint="-s exactness=elastic, or freeze that parameter",
        )
    return DryStep(not unused and (has_nested_backward or not graph_may_vary(model, task)), unused)


def _uses_ddp(config: TrainingConfig) -> bool:
    return config.scale.parallel is Parallel.DDP and config.exactness is not Exactness.ELASTIC


def _run(config: TrainingConfig, model: nn.Module, task: Task, batches: list[Batch]) -> set[nn.Parameter]:
    """Run the first batch twice, forward and backward, and the others forward. Returns the parameters in the graph."""
    was_deterministic, num_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    try:
        for batch in batches[1:]:
            _loss(config, model, task, batch)
        for threads in (num_threads, 1):  # a library may add in another order each time, with several threads
            make_deterministic(config.deterministic, threads)
            (first, _), (second, used) = (_pass(config, model, task, batches[0]) for _ in range(2))
            if first == second or config.exactness is Exactness.FAST:
                return used
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(was_deterministic)
    name = next(name for name in {**first, **second} if first.get(name) != second.get(name))
    raise ConfigError(
        f"two passes over the first micro-batch with the same seed differ in {name}: "
        f"{type(unwrap(model)).__name__} draws random numbers of its own, or remembers earlier batches",
        hint="draw random numbers from torch's default generator; or set exactness: fast, which promises no bits",
    )


def _pass(
    config: TrainingConfig, model: nn.Module, task: Task, batch: Batch
) -> tuple[dict[str, str], set[nn.Parameter]]:
    """Return digests of the loss and of each gradient, by name of the parameter, and the parameters in the graph."""
    model.zero_grad(set_to_none=True)
    loss = _loss(config, model, task, batch)
    used = _leaves(loss)
    loss.backward()
    found = {"the loss": loss} | {f"the gradient of {name}": item.grad for name, item in model.named_parameters()}
    return {name: tensor_digest(item) for name, item in found.items() if item is not None}, used


def _loss(config: TrainingConfig, model: nn.Module, task: Task, batch: Batch) -> Any:
    seed_everything(config.seed, 0, 0)
    with World().autocast(config.train.precision):
        loss = task.loss_sum(model, batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ConfigError(
            f"task {config.model.task} gives no loss to train on: it must be one number that depends on weights",
            hint="return the sum over the batch, as a tensor, from the `loss` of the task",
        )
    return loss


def _leaves(loss: torch.Tensor) -> set[Any]:
    """Return the tensors that the backward pass from `loss` would give a gradient."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {node.variable} if hasattr(node, "variable") else set()
            waiting += [following for following, _ in node.next_functions]
    return found


def _check_modules(before: dict[str, nn.Module], model: nn.Module) -> None:
    """Raise ConfigError if the forward pass replaced a module: a resumed run would begin with the old one."""
    for name, module in model.named_modules():
        if before.get(name) is not module:
            raise ConfigError(
                f"{type(unwrap(model)).__name__} replaces {name} during training; a resumed run could not repeat that",
                hint="choose the final form in the model's configuration",
            )


def _check_no_lookahead(model: nn.Module, task: Task, batch: Batch) -> None:
    """Raise ConfigError if the prediction of a token depends on the token: the model would learn to copy it."""
    [ids] = batch["input_ids"][:1]
    ids = ids[: int(batch["attention_mask"][0].sum())] if "attention_mask" in batch else ids
    other = ids.clone()
    other[-1] = ids[-1] - 1 if ids[-1] else 1
    model.eval()
    with torch.no_grad():
        first, second = (
            task.forward(model, {"input_ids": item[None], "attention_mask": torch.ones_like(item[None])}).logits[:, :-1]
            for item in (ids, other)
        )
    if first.numel() and (first - second).abs().max() > MAX_LEAK * first.abs().max():
        raise ConfigError(
            f"{type(unwrap(model)).__name__} sees the tokens that it predicts, so it would only learn to copy them",
            hint="configure it as a decoder, or use a decoder such as gpt2 or llama",
        )


def _is_of_libraries(model: nn.Module, task: Task) -> bool:
    """Return whether neither the model nor the task is code of the user."""
    modules = type(base_model(model)).__module__, type(task).__module__
    return modules[0].startswith("transformers.") and modules[1].startswith("outlast.")


def graph_may_vary(model: nn.Module, task: Task) -> bool:
    """Return whether the parameters in use may differ between micro-batches: LayerDrop, experts, users' code."""
    if not _is_of_libraries(model, task):
        return True
    inner = base_model(model)
    drops = any("layerdrop" in name and value for name, value in inner.config.to_dict().items())
    return drops or any("experts" in name for name, _ in inner.named_modules())  # none may get a token
