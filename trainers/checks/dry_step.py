"""The dry step: the first micro-batch, forward and backward, on the host, before any worker is started.

It finds what else only the first step shows, such as a token that the embedding lacks or a head whose logits do not fit
the labels, and which parameters get no gradient. It changes nothing: the model is built for it, and dropped.

It must not refuse what trains: an error that a smaller part of a micro-batch, this machine's memory or its lack of a
GPU may explain means that there was no dry step.
"""

import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.state.named_weights import carried_state, plain_name, unwrap
from outlast.checkpointing.storage.base import Storage
from outlast.trainers.checks.dry_step_part import cut, max_tokens, parts, size
from outlast.trainers.checks.parameter_watch import ParameterWatch
from outlast.trainers.checks.resume_rehearsal import check_resume, is_affordable, prepare_resume
from outlast.trainers.checks.sharded_graph import BlockUse, check_can_shard, drops_layers
from outlast.trainers.config.train import Exactness, Parallel
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.distributed.determinism import make_deterministic, seed_everything
from outlast.trainers.distributed.world import World, tensors_for_ddp
from outlast.trainers.loop.buffer_change_check import tensor_digest, watch_buffers
from outlast.trainers.loop.compile_and_recompute import enable_recomputing
from outlast.trainers.models.build import build_model
from outlast.trainers.models.tensor_checks import check_finite
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import Batch, Task, find_task
from outlast.trainers.tasks.model_inputs import base_model
from outlast.trainers.user_code import describe_error

#: Micro-batches of which the parameters that get a gradient are compared, where all must be the same.
NUM_COMPARED = 4
#: Share of the largest logit by which logits may differ for other reasons than a token that they depend on.
MAX_LEAK = 1e-4
#: Words of errors that may come from the host having no GPU.
_NEEDS_GPU = re.compile(
    r"cu(da|dnn|blas)|triton|\bgpu|flash|nvidia|rocm|\bhip|active driver|not implemented|'CPU' backend", re.IGNORECASE
)
#: Packages whose kernels are for GPUs only.
_GPU_PACKAGES = frozenset(
    ("apex", "bitsandbytes", "causal_conv1d", "cupy", "fla", "flash_attn", "flash_attn_interface", "flashinfer")
    + ("kernels", "liger_kernel", "mamba_ssm", "tilelang", "transformer_engine", "triton", "unsloth", "xformers")
)
#: Words of errors of an allocation that failed; torch raises them as RuntimeError.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DryStep:
    """What a dry step found.

    Attributes:
        static_graph: Whether every trained parameter gets a gradient from every micro-batch, as far as is known.
            Without a dry step it is taken to be so, except for architectures known for the contrary.
        unused: Trained parameters without a gradient.
        skipped: Why there was no dry step; empty if there was one.
    """

    static_graph: bool = False
    unused: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def notes(self) -> list[str]:
        """Return what a user should know of it, one sentence each."""
        found = [f"the first step was not tried in advance: {self.skipped}"] if self.skipped else []
        if self.unused:
            names = ", ".join(self.unused[:3]) + (", …" if len(self.unused) > 3 else "")
            found.append(f"the first micro-batch gives no gradient to {len(self.unused)} trained parameters: {names}")
        return found


class _Trial:
    """The model, built to be tried, and its passes.

    Args:
        config: The settings.
        model: The model.
        task: What it learns.
        will_shard: Whether the workers will shard it.

    Attributes:
        is_whole: Whether what was run is the whole first micro-batch.
        batches: What was run.
        digests: Digests of loss and gradients in each of the two passes over it, by name.
        in_graph: Parameters in the graph of its loss.
        in_outputs: Those in the graphs of the model's outputs.
        varies: Whether micro-batches give gradients to different parameters.
        sees_ahead: Whether the prediction of a token depends on the token.
    """

    def __init__(self, config: TrainingConfig, model: nn.Module, task: Task, *, will_shard: bool) -> None:
        self.config, self.model, self.task, self.name = config, model, task, type(unwrap(model)).__name__
        recomputes = config.train.gradient_checkpointing
        if recomputes:
            enable_recomputing(model)
        self._guards = watch_buffers(model, config.exactness, recomputes=recomputes, will_shard=will_shard)
        self._modules = dict(model.named_modules())
        self.is_whole, self.sees_ahead, self.varies = True, False, False
        self.batches: Sequence[Batch] = ()
        self.digests: list[dict[str, str]] = []
        self.in_graph: set[Any] = set()
        self.in_outputs: set[Any] = set()
        self._block_use = BlockUse(model) if will_shard else None
        self._outputs: list[Any] = []
        model.register_forward_hook(lambda _module, _args, outputs: self._outputs.append(outputs))
        self._step = 0
        self.remember()

    def remember(self) -> None:
        """Take the weights and saved buffers as those that each pass starts from."""
        self.parameters, carried = ParameterWatch(self.model), set(carried_state(self.model))
        self._saved = {name: item.clone() for name, item in self.model.named_buffers() if plain_name(name) in carried}

    def run(self, batches: Sequence[Batch]) -> None:
        """Run the first batch twice, forward and backward; before that the second forward, or all to compare them.

        Raises ConfigError if a pass changes what no pass may change, and whatever the model and the task raise.
        """
        self.batches = batches
        was_deterministic, num_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
        try:
            for number, batch in enumerate(batches[1:NUM_COMPARED] if self._block_use else batches[1:2], 1):
                self._leaves(self._loss(batch, number))
            for threads in (num_threads, 1):  # a library may add in another order each time, with several threads
                make_deterministic(self.config.deterministic, threads)
                self.digests = [self._pass(batches[0]) for _ in range(2)]
                if self.digests[0] == self.digests[1] or self.config.exactness is Exactness.FAST:
                    break
        finally:
            torch.set_num_threads(num_threads)
            torch.use_deterministic_algorithms(was_deterministic)
        self.check_state()
        if self._block_use is not None:
            self._block_use.check()
        if self.has_nested_backward and _is_of_users(self.model, self.task):
            trained = set(self.digests[0])
            self.varies = any(
                set(self._pass(item, number)) != trained for number, item in enumerate(batches[1:NUM_COMPARED], 1)
            )
            self._pass(batches[0])
        self._restore()
        if self.task.auto_class == "AutoModelForCausalLM" and not _is_of_users(self.model, self.task):
            self.sees_ahead = _sees_ahead(self.model, self.task, batches[0])

    def rehearse_resume(self, again: nn.Module, task: Task, batch: Batch) -> None:
        """Compare a pass of the used model with one of a model and task that were built again, on equal weights.

        Raises ConfigError if they differ: the used one keeps what no checkpoint holds.
        """
        self._restore()
        prepare_resume(self.model, again)
        self.remember()
        other = _Trial(self.config, again.train(), task, will_shard=False)
        self._step = other._step = 1
        check_resume(self.model, (lambda: self._pass(batch), lambda: other._pass(batch)))

    def check_state(self) -> None:
        """Raise ConfigError if the forward pass changed buffers that it must not, or replaced a module or parameter."""
        self.parameters.check_objects()
        for guard in self._guards:
            guard.check()
        for name, module in self.model.named_modules():
            if self._modules.get(name) is not module:
                raise ConfigError(
                    f"{self.name} replaces {name} during training; a resumed run could not repeat that",
                    hint="choose the final form in the model's configuration",
                )

    def _restore(self) -> None:
        """Restore what a checkpoint holds: a pass may depend on the one before through it."""
        self.parameters.restore()
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, before in self._saved.items():
                if name in buffers and buffers[name].shape == before.shape:
                    buffers[name].copy_(before)
                else:
                    owner, _, leaf = name.rpartition(".")
                    self.model.get_submodule(owner)._buffers[leaf] = before.clone()

    @property
    def has_nested_backward(self) -> bool:
        """Whether a parameter has a gradient that the graph of the loss does not lead to."""
        found = [item for item in self.model.parameters() if item.requires_grad and item.grad is not None]
        return any(item not in self.in_graph for item in found)

    def _leaves(self, loss: torch.Tensor) -> set[Any]:
        """Return the parameters in the graph of a loss that was just computed, and compare with what outputs show."""
        found = _leaves([loss])
        if self._block_use is not None:
            self._block_use.end(found)
        self.in_outputs = _leaves([tensor for item in self._outputs for tensor in tensors_for_ddp(item)])
        return found

    def _pass(self, batch: Batch, number: int = 0) -> dict[str, str]:
        self.model.zero_grad(set_to_none=True)
        loss = self._loss(batch, number)
        self.in_graph = self._leaves(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {"the loss": loss} | {
            f"the gradient of {name}": item.grad
            for name, item in self.model.named_parameters()
            if item.grad is not None
        }
        return {name: tensor_digest(item.to_dense()) for name, item in found.items()}

    def _loss(self, batch: Batch, number: int = 0) -> torch.Tensor:
        self._restore()
        self._outputs.clear()
        if self._block_use is not None:
            self._block_use.begin()
        seed_everything(self.config.seed, self._step, number)
        with World().autocast(self.config.train.precision):
            loss = self.task.loss_sum(self.model, batch)
        self.parameters.look()
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ConfigError(
                f"task {self.config.model.task} gives no loss to train on: it must be one number that depends on "
                "weights",
                hint="return the sum over the batch, as a tensor, from the `loss` of the task",
            )
        return loss


def dry_step(
    config: TrainingConfig, prepared: Prepared, storage: Storage, meta: nn.Module, *, num_workers: int, on_gpu: bool
) -> DryStep:
    """Run the first micro-batch of a run twice, and the second forward only; parts of them if they are too large.

    Args:
        config: The settings.
        prepared: The prepared data.
        storage: Holds it.
        meta: The model without memory, from `check_model`; one that is too large is not built here.
        num_workers: The largest number of workers.
        on_gpu: Whether the workers have GPUs: then errors that may come from their lack here are not raised.

    Raises:
        ConfigError: The step fails, or trains nothing, or changes the model in a way that a resume cannot repeat.
    """
    task = _make_task(config, prepared, storage)
    if will_shard := config.scale.parallel is Parallel.FSDP and num_workers > 1:
        check_can_shard(meta)
    try:
        tried = _try_parts(config, prepared, storage, task, meta, will_shard=will_shard)
        if isinstance(tried, _Trial):
            found = _judge(tried, num_workers)
            _rehearse_resume(tried, prepared, storage)
            return found
    except Exception as error:
        tried = _excuse(error, on_gpu=on_gpu)
        if not tried and isinstance(error, OutlastError):
            raise
        if not tried:
            raise ConfigError(
                f"the first micro-batch fails in {type(unwrap(meta)).__name__}: {describe_error(error)}",
                hint="check that `model:`, its tokenizer and `data:` belong together",
            ) from error
    return DryStep(static_graph=not (not _is_of_users(meta, task) and graph_may_vary(meta)), skipped=tried)


def _make_task(config: TrainingConfig, prepared: Prepared, storage: Storage) -> Task:
    return find_task(config.model.task)(config.data, prepared.tokenizer(storage), prepared.facts)


def _rehearse_resume(trial: _Trial, prepared: Prepared, storage: Storage) -> None:
    """Play a resume, of a model or task of the user that is small enough for it."""
    config, model = trial.config, trial.model
    if config.exactness is Exactness.FAST or not trial.is_whole or not _is_of_users(model, trial.task):
        return
    if is_affordable(model, trial.task, trial.batches[-1]):
        task = _make_task(config, prepared, storage)
        again, _ = build_model(config.model, task, prepared.tokenizer(storage), config.seed, fresh=False)
        trial.rehearse_resume(again, task, trial.batches[-1])


def _try_parts(
    config: TrainingConfig, prepared: Prepared, storage: Storage, task: Task, meta: nn.Module, *, will_shard: bool
) -> _Trial | str:
    """Run the first micro-batches, or the first of their parts that does not fail. Returns why none was run, if so."""
    plan, samples = make_plan(config, prepared.num_samples, 1), prepared.split(storage, "train")
    batches = [
        task.collate(samples.take(plan.samples(positions)), plan.keys(positions))
        for positions in plan.cut(plan.positions(0))[:NUM_COMPARED]
    ]
    whole = size(batches[0], max(prepared.longest.values(), default=1))
    chosen = parts(*whole, max_tokens(meta, task, whole[1]))
    if not chosen:
        num_parameters = sum(parameter.numel() for parameter in meta.parameters())
        return f"a model of {num_parameters:,} parameters is too large for this machine"
    model, _ = build_model(config.model, task, prepared.tokenizer(storage), config.seed, fresh=True)
    if config.model.path is not None:
        lora = config.model.lora.path if config.model.lora else None
        check_finite(model, [f"model.path {config.model.path}", *([f"model.lora.path {lora}"] if lora else [])])
    trial, skipped = _Trial(config, model.train(), task, will_shard=will_shard), ""
    for part in chosen:
        trial.is_whole = part == whole
        try:
            trial.run(batches if trial.is_whole else cut(batches, task, part[0], part[1] / whole[1]))
        except Exception as error:
            trial.check_state()  # a change of the model may be the cause
            if trial.is_whole:
                raise
            skipped = f"a part of the first micro-batch fails, and all of it is too large: {describe_error(error)}"
        else:
            return trial
    return skipped


def _judge(trial: _Trial, num_workers: int) -> DryStep:
    """Return what a trial found. Raises ConfigError as `dry_step`."""
    config, model, name = trial.config, trial.model, trial.name
    (first, second), in_graph = trial.digests, trial.in_graph
    if num_workers > 1 or config.exactness is Exactness.ELASTIC:
        trial.parameters.check_values()
    differing = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if differing and config.exactness is not Exactness.FAST:
        raise ConfigError(
            f"two passes over the first micro-batch with the same seed differ in {differing[0]}: {name} draws random "
            "numbers of its own, or remembers earlier batches",
            hint="draw random numbers from torch's default generator; or set exactness: fast, which promises no bits",
        )
    if trial.sees_ahead:
        raise ConfigError(
            f"{name} sees the tokens that it predicts, so it would only learn to copy them",
            hint="configure it as a decoder, or use a decoder such as gpt2 or llama",
        )
    trained = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    unused = tuple(key for key, parameter in trained if parameter.grad is None)
    if len(unused) == len(trained):
        raise ConfigError("no parameter gets a gradient from the loss", hint="check the loss of the task, and freezing")
    sparse = [key for key, parameter in trained if parameter.grad is not None and parameter.grad.is_sparse]
    if sparse:
        raise ConfigError(
            f"{sparse[0]} gets a sparse gradient, of which torch computes no norm",
            hint="make its nn.Embedding with sparse=False",
        )
    has_nested_backward, is_ddp = trial.has_nested_backward, num_workers > 1 and _uses_ddp(config)
    beside = [key for key, parameter in trained if parameter in in_graph - trial.in_outputs]
    if beside and is_ddp and not has_nested_backward:
        raise ConfigError(
            f"the loss depends on {beside[0]} by another way than the outputs of {name}, where DDP looks for it",
            hint="return what the loss needs from the model's `forward`; or -s exactness=elastic",
        )
    if trial.varies and is_ddp:
        raise ConfigError(
            f"{name} runs backward passes within its backward pass, and micro-batches give gradients to different "
            "parameters; DDP does not support both",
            hint="-s exactness=elastic, or checkpoint with use_reentrant=False",
        )
    is_static = has_nested_backward or not (_is_of_users(model, trial.task) or graph_may_vary(model))
    if not unused or (has_nested_backward and not trial.is_whole):  # all of the micro-batch may use them
        return DryStep(is_static, unused)
    if has_nested_backward and is_ddp:
        raise ConfigError(
            f"{name} runs backward passes within its backward pass, and {unused[0]} gets no gradient; DDP does not "
            "support both",
            hint="-s exactness=elastic, or freeze that parameter",
        )
    return DryStep(static_graph=False, unused=unused)


def _uses_ddp(config: TrainingConfig) -> bool:
    return config.scale.parallel is Parallel.DDP and config.exactness is not Exactness.ELASTIC


def _excuse(error: BaseException, *, on_gpu: bool) -> str:
    """Return what about this machine may be the cause of an error of the model; empty if nothing is."""
    causes = list(_causes(error))
    if any(isinstance(item, MemoryError) or _NO_MEMORY.search(str(item)) for item in causes):
        return f"this machine has too little memory: {describe_error(error)}"
    if on_gpu and any(_NEEDS_GPU.search(str(item)) or _GPU_PACKAGES & _packages(item) for item in causes):
        return f"it needs a GPU: {describe_error(error)}"
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the errors of models and libraries that led to this one, itself included."""
    while error is not None:
        if isinstance(error, OutlastError):
            error = error.__cause__
        else:
            yield error
            error = error.__cause__ or error.__context__


def _packages(error: BaseException) -> set[str]:
    """Return the names of the packages that a traceback goes through."""
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return {str(name).partition(".")[0] for name in names}


def _leaves(tensors: Sequence[torch.Tensor]) -> set[torch.Tensor]:
    """Return the leaves that the backward passes from `tensors` would give a gradient."""
    found, seen = {tensor for tensor in tensors if tensor.is_leaf}, set[Any]()
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {node.variable} if hasattr(node, "variable") else set()
            waiting += [following for following, _ in node.next_functions]
    return found


def _sees_ahead(model: nn.Module, task: Task, batch: Batch) -> bool:
    """Return whether the prediction of a token depends on the token."""
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
    model.train()
    return bool(first.numel()) and bool((first - second).abs().max() > MAX_LEAK * first.abs().max())


def _is_of_users(model: nn.Module, task: Task) -> bool:
    """Return whether the model or the task is code of the user."""
    modules = type(base_model(model)).__module__, type(task).__module__
    return not (modules[0].startswith("transformers.") and modules[1].startswith("outlast."))


def graph_may_vary(model: nn.Module) -> bool:
    """Return whether the parameters that a model of transformers uses may differ between micro-batches.

    They do with LayerDrop, and with experts, none of which may get a token.
    """
    return drops_layers(model) or any("experts" in name for name, _ in base_model(model).named_modules())
