"""Pretrained weights against the model that a task needs: what the files lack, have too much, or hold in other sizes.

transformers loads what fits and makes the rest new. Here only a head may be new: what lies outside the base model that
all heads of an architecture share. Prefixes that wrappers left in the files' names are removed if that makes them fit.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from outlast.checkpointing.error_hints import shorten_list
from outlast.checkpointing.errors import ConfigError
from outlast.trainers.models.transformers_internals import initialize_weights, model_mapping, quiet_transformers

#: Names of wrapping modules: torch.compile, FSDP, activation checkpointing. No model has modules of these names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: Names before all others: of DDP and DataParallel, and of classes that hold the model in an attribute.
_HOLDERS = ("module", "model")
_MAX_NESTED = 4
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How the files of a pretrained model fit.

    Attributes:
        new: Weights of the head that the files lack, or hold in another size.
        notes: What a user should know of it, one sentence each.
    """

    new: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Misfit:
    """The weights that do not fit, by their names in the model; sizes are the files' and the model's."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: Mapping[str, tuple[Sequence[int], Sequence[int]]]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "_Misfit":
        sizes = {name: (list(there), list(here)) for name, there, here in sorted(info.get("mismatched_keys", ()))}
        return cls(tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"])), sizes)


def load_pretrained(
    builder: Any, path: str, config: Any, *, new_head: bool = False, on_meta: bool = False, **trusted: Any
) -> tuple[Any, LoadReport]:
    """Load a pretrained model in float32 by its class or Auto class. Returns it, and how its files fit.

    Args:
        builder: The class or Auto class.
        path: Directory or hub id.
        config: The model's configuration.
        new_head: Whether a head may be made new that the files lack or hold in another size.
        on_meta: Whether to read names and sizes only; the model is then on the meta device.
        trusted: Arguments about code beside the weights.

    Raises:
        ConfigError: The files lack weights of the model, or hold them in other sizes.
    """
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True, **trusted}
    is_own = isinstance(builder, type) and not issubclass(builder, transformers.PreTrainedModel)
    if not is_own or model_mapping(builder) is not None:
        options["ignore_mismatched_sizes"] = True  # sizes are compared here, for all weights at once
    if on_meta:
        options["device_map"] = "meta"
    model, info = _load(builder, path, options)
    misfit, notes = _Misfit.of(info), list[str]()
    with torch.random.fork_rng(devices=[]):  # what follows must not change the random numbers of a new adapter
        error = _find_error(model, misfit, path, new_head=new_head)
    if error is not None:
        for removed, renaming in _renamings(misfit.unexpected, _source_prefix(config)):
            renamed = {**options, "key_mapping": renaming}
            tried, info = _load(builder, path, {**renamed, "device_map": "meta"})
            if _find_error(tried, _Misfit.of(info), path, new_head=new_head) is None:
                model, info = (tried, info) if on_meta else _load(builder, path, renamed)
                misfit, error = _Misfit.of(info), None
                notes.append(f"the names of the weights in {path} have the prefix {removed}, which is left out")
                break
    if error is not None:
        raise error
    return model, LoadReport((*misfit.missing, *misfit.resized), (*notes, *_notes(model, misfit, path)))


def _load(builder: Any, path: str, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    with quiet_transformers():  # `LoadReport` replaces its report
        model, info = builder.from_pretrained(path, **options)
    return model, info


def _source_class(config: Any) -> Any:
    """Return the transformers class that a configuration names as that of its weights, if there is one."""
    names = getattr(config, "architectures", None) or [""]
    source = getattr(transformers, str(names[0]), None)
    return source if isinstance(source, type) and issubclass(source, transformers.PreTrainedModel) else None


def _source_prefix(config: Any) -> str:
    """Return the name before the base model's in the files; LlamaForQuestionAnswering has another than its siblings."""
    return str(getattr(_source_class(config), "base_model_prefix", ""))


def _renamings(names: Sequence[str], source_prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield prefixes that wrappers may have left in the names, and the renaming that removes them."""
    holders = [item for item in (*_HOLDERS, source_prefix) if item]
    wrappers = [item for item in _WRAPPERS if any(item in name.split(".") for name in names)]
    # A renaming is applied once to a name, so a repeated prefix needs several; each key of a mapping must differ.
    inner = {rf"(?<![^.]){item}\.{'(?:)' * time}": "" for item in wrappers for time in range(_MAX_NESTED)}
    if wrappers:
        yield ", ".join(f"{item}." for item in wrappers), inner
    outer = dict[str, str]()
    plain = [re.sub("|".join(inner), "", name) if inner else name for name in names]
    for _ in range(_MAX_NESTED):
        holder = next((item for item in holders if any(name.startswith(f"{item}.") for name in plain)), None)
        if holder is None:
            return
        outer[rf"^{holder}\.{'(?:)' * len(outer)}"] = ""
        plain = [name.removeprefix(f"{holder}.") for name in plain]
        yield ", ".join([*(f"{item}." for item in wrappers), *(f"{holder}." for _ in outer)]), {**inner, **outer}


def _find_error(model: Any, misfit: _Misfit, path: str, *, new_head: bool) -> ConfigError | None:
    """Return the error about weights that do not fit; None if they do, or only make a new head."""
    if not misfit.missing and not misfit.resized:
        return None
    name, essential = type(model).__name__, _essential(model, set(misfit.missing))
    lost = [item for item in misfit.missing if item in essential]
    if not lost and not new_head:
        lost = _lost_head(model, misfit.missing)
    if lost:
        beside = f"; they have {_listed(misfit.unexpected)}, which {name} does not have" if misfit.unexpected else ""
        hint = "check that the directory is complete, and that config.json is that of these weights"
        if not any(item in essential for item in lost):
            hint += "; or set model.new_head: true to make the head new"
        return ConfigError(
            f"the files of model.path {path} lack {_listed(lost)}, which {name} needs{beside}", hint=hint
        )
    sizes = {item: size for item, size in misfit.resized.items() if item in essential}
    if sizes:
        return ConfigError(
            f"the files of model.path {path} hold weights of {name} in other sizes than its configuration: "
            f"{_listed_sizes(sizes)}",
            hint="restore its config.json, and leave sizes out of model.overrides",
        )
    if misfit.resized and not new_head:
        return ConfigError(
            f"the head in model.path {path} has another size than this run needs: {_listed_sizes(misfit.resized)}",
            hint="use the labels that the model was trained with; or set model.new_head: true to make the head new",
        )
    return None


def _essential(model: Any, missing: set[str]) -> set[str]:
    """Return the weights that may not be new: those of the base model that all heads of the architecture share.

    A class of the user without a base model may have new parts, but not no part of the files.
    """
    names = set(model.state_dict())
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if isinstance(base, nn.Module):
        prefix += "."
    else:  # such as T5, whose models with a head have the parts of the base model themselves
        prefix, base = "", _base_of(model)
    if base is None:
        is_known = type(model).__module__.startswith("transformers.")
        return names if is_known or names <= missing else set()
    own = _without_pooler(base)
    return {item for item in names if item.removeprefix(prefix) in own and item.startswith(prefix)}


def _base_of(model: Any) -> Any:
    """Return a base model of the architecture on the meta device, if transformers has one that is another class."""
    known = model_mapping(transformers.AutoModel)
    if type(model.config) not in known or not type(model).__module__.startswith("transformers."):
        return None
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(model.config)
    return None if type(base) is type(model) else base


def _without_pooler(base: Any) -> set[str]:
    """Return the names of a base model's weights without a pooler, which only some heads use."""
    names = set(base.state_dict())
    if "add_pooling_layer" not in inspect.signature(type(base).__init__).parameters:
        return names
    with torch.device("meta"):
        return names & set(type(base)(base.config, add_pooling_layer=False).state_dict())


def _lost_head(model: Any, missing: Sequence[str]) -> list[str]:
    """Return the missing weights of a head that models of the files' own class have."""
    source = _source_class(model.config)
    if source is None or not isinstance(model.config, source.config_class or ()):
        return []
    with torch.device("meta"):
        made = source(model.config)
        expected = set(made.state_dict())
    return [item for item in missing if item in expected]


def find_uninitialized(model: Any, new: Sequence[str]) -> list[str]:
    """Return the new weights that transformers leaves uninitialized: the class sets them in its constructor only.

    `from_pretrained` does not run that with memory, so they hold whatever was there before.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return []
    found = []
    for name in new:
        names = name.split(".")
        if len(names) < 2:
            continue
        for owner in (names[:-1], names[:-2]):
            again = deepcopy(model.get_submodule(".".join(owner))) if owner else None
            if again is None:
                continue
            tensor = again.state_dict(keep_vars=True)[".".join(names[len(owner) :])]
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                tensor.fill_(torch.nan)
                initialize_weights(model, again)
                if not tensor.isnan().any():
                    break
        else:
            found.append(name)
    return found


def _notes(model: Any, misfit: _Misfit, path: str) -> Iterator[str]:
    if misfit.missing:
        yield f"new, because the files of {path} lack them: {_listed(misfit.missing)}"
    if misfit.resized:
        yield f"new, because of another size in {path}: {_listed_sizes(misfit.resized)} (model.new_head)"
    if misfit.unexpected:
        yield f"not used by {type(model).__name__}: {_listed(misfit.unexpected)} of {path}"


def _listed(names: Sequence[str]) -> str:
    return shorten_list(names, _MAX_SHOWN, "weights")


def _listed_sizes(sizes: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> str:
    return _listed([f"{name} is {there} in the files and {here} here" for name, (there, here) in sizes.items()])
