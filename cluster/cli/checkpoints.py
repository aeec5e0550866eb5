"""The `checkpoints` commands: each resolves its run, calls one function and prints the result."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, Typer

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.location import is_url
from outlast.cluster.cli.options import (
    AsJson,
    Base,
    Code,
    Run,
    StorageRoot,
    Texts,
    Trusted,
    make_code_importable,
    print_unreadable,
)
from outlast.cluster.config.run_reference import find_run
from outlast.cluster.formatting import size, when
from outlast.cluster.output import print_json, print_line

if TYPE_CHECKING:
    from outlast.checkpointing.tools.diff import CheckpointDiff
    from outlast.checkpointing.tools.export import Content, WriteWeights
    from outlast.checkpointing.tools.query import ResolvedCheckpoint

checkpoints = Typer(help="List, verify, compare, keep, delete and export a run's checkpoints.", no_args_is_help=True)

_OR_MODEL = "newest, best, model, a step, or step@attempt."
CheckpointName = Annotated[str, Argument(metavar="CHECKPOINT", help="newest, best, a step, or step@attempt.")]


@checkpoints.command("ls")
def list_(run: Run, storage: StorageRoot = "./runs", as_json: AsJson = False) -> None:
    """List the accepted checkpoints, newest first."""
    from outlast.checkpointing.tools import query as commands

    store, retention = find_run(run, storage)
    catalog = commands.load_catalog(store)
    rows = commands.list_checkpoints(store, catalog, retention)
    for item in catalog.rejected:
        print_line(f"damaged: {item.ref}: {'; '.join(item.reasons)}", to_stderr=True)
    print_unreadable(store.unreadable)
    if as_json:
        print_json(rows)
        return
    print_line(f"{'step':>8}  {'size':>9}  {'committed':19}  metrics")
    for row in rows:
        metrics = "  ".join(f"{key} {value:.4f}" for key, value in sorted(row["metrics"].items()))
        flags = "".join(f"  {flag}" for flag in ("best", "pinned") if row[flag])
        print_line(f"{row['step']:>8}  {size(row['bytes']):>9}  {when(row['committed_at'])}  {metrics}{flags}")


@checkpoints.command()
def show(run: Run, which: CheckpointName = "newest", storage: StorageRoot = "./runs", as_json: AsJson = False) -> None:
    """Show one checkpoint: its files, digests, metrics and lineage."""
    from outlast.checkpointing.tools import query as commands

    store, retention = find_run(run, storage)
    body = commands.show_checkpoint(store, which, retention)
    if as_json:
        print_json(body)
        return
    pinned = ", pinned" if body["pinned"] else ""
    print_line(
        f"checkpoint-{body['step']} by attempt {body['attempt']}, committed {when(body['committed_at'])}{pinned}"
    )
    print_line(body["path"])
    print_line(f"{size(body['bytes'])} by {body['world_size']} ranks; metrics {body['metrics']}")
    print_line(f"lineage: {', '.join(body['lineage']) or 'none'}")
    if body["record"]:
        print_line(f"record: {body['record']}")
    for entry in body["files"]:
        print_line(f"  {entry['xxh3_128']}  {size(entry['num_bytes']):>9}  {entry['path']}")


@checkpoints.command()
def verify(
    run: Run,
    which: Annotated[str | None, Argument(metavar="CHECKPOINT", help=f"Only this one: {_OR_MODEL}")] = None,
    storage: StorageRoot = "./runs",
    as_json: AsJson = False,
) -> None:
    """Read every byte and compare it with the committed digests. Exit code 5 if anything is damaged, 1 if unread."""
    from outlast.checkpointing.tools.query import verify_run

    store, retention = find_run(run, storage)
    verdicts = verify_run(store, which, retention)
    if as_json:
        print_json([asdict(item) for item in verdicts])
    else:
        for item in verdicts:
            verdict = "damaged" if item.faults else "unread" if item.unread else "whole"
            print_line(f"{verdict:8} {size(item.num_bytes):>9}  {item.path}")
            for line in (*item.faults, *filter(None, [item.unread])):
                print_line(f"         {line}")
            if item.litter:
                print_line(f"         not outlast's, and harmless: {', '.join(item.litter)}")
        if not verdicts:
            print_line("no checkpoints yet", to_stderr=True)
    print_unreadable(store.unreadable)
    raise Exit(5 if any(item.faults for item in verdicts) else 1 if any(item.unread for item in verdicts) else 0)


@checkpoints.command()
def path(
    run: Run,
    which: Annotated[str, Argument(metavar="CHECKPOINT", help=_OR_MODEL)] = "newest",
    storage: StorageRoot = "./runs",
) -> None:
    """Print the path of a checkpoint, for `from_pretrained`."""
    from outlast.checkpointing.tools import query as commands

    store, retention = find_run(run, storage)
    print_line(commands.resolve_checkpoint(store, which, retention).url)


@checkpoints.command()
def diff(
    run: Run,
    first: Annotated[str, Argument(metavar="A", help=_OR_MODEL)],
    second: Annotated[str, Argument(metavar="B", help="Likewise.")],
    other: Annotated[str | None, Option("--with", metavar="RUN", help="The run of B, if it is another one.")] = None,
    optimizer: Annotated[bool, Option("--optimizer", help="Compare the optimizer state too.")] = False,
    storage: StorageRoot = "./runs",
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor, and their settings."""
    from outlast.checkpointing.tools import query as commands
    from outlast.checkpointing.tools.diff import diff_checkpoints

    store, retention = find_run(run, storage)
    ours = commands.resolve_checkpoint(store, first, retention)
    if other is not None:
        store, retention = find_run(other, storage)
    theirs = commands.resolve_checkpoint(store, second, retention)
    result = diff_checkpoints(ours, theirs, optimizer=optimizer)
    if as_json:
        tensors = [item.as_json() for item in result.tensors]
        print_json({"a": ours.url, "b": theirs.url, "settings": result.settings, "tensors": tensors})
        return
    print_line(f"a  {ours.url}")
    print_line(f"b  {theirs.url}")
    _print_diff(result)


def _print_diff(result: CheckpointDiff) -> None:
    from outlast.checkpointing.tools.diff import ChangeKind

    for key, pair in (result.settings or {}).items():
        print_line(f"{key.removeprefix('mathematics.')}: {pair[0]!r} → {pair[1]!r}")
    if not result.settings:
        print_line("the settings are not recorded" if result.settings is None else "the settings are the same")
    print_line("tensors: " + ", ".join(f"{result.count(change)} {change.value}" for change in ChangeKind))
    different = [item for item in result.tensors if item.change is not ChangeKind.EQUAL]
    if different:
        print_line(f"{'':8}  {'norm of a':>11}  {'norm of b':>11}  {'of b - a':>11}  {'largest':>11}  name")
    for item in different:
        numbers = (*item.norms, item.distance, item.largest)
        shown = "  ".join(f"{'-' if number is None else format(number, '.5g'):>11}" for number in numbers)
        tensors = zip(item.dtypes, item.shapes, strict=True)
        specs = [f"{dtype} {list(shape)}" for dtype, shape in tensors if shape is not None]
        print_line(f"{item.change.value:8}  {shown}  {item.name} {' → '.join(dict.fromkeys(specs))}")


@checkpoints.command()
def pin(run: Run, which: CheckpointName, storage: StorageRoot = "./runs", as_json: AsJson = False) -> None:
    """Exempt a checkpoint from retention; also while the run is running."""
    from outlast.checkpointing.tools import pin_and_prune as keeping

    store, retention = find_run(run, storage)
    ref = keeping.pin(store, which, retention)
    _print_ref("pinned", ref.name, as_json=as_json)


@checkpoints.command()
def unpin(
    run: Run,
    which: Annotated[str, Argument(metavar="CHECKPOINT", help="A step, or step@attempt.")],
    storage: StorageRoot = "./runs",
    as_json: AsJson = False,
) -> None:
    """Remove a pin; retention may delete the checkpoint from then on."""
    from outlast.checkpointing.tools import pin_and_prune as keeping

    store, _ = find_run(run, storage)
    ref = keeping.unpin(store, which)
    _print_ref("unpinned", ref.name, as_json=as_json)


def _print_ref(verb: str, name: str, *, as_json: bool) -> None:
    if as_json:
        print_json({verb: name}, indent=None)
    else:
        print_line(f"{verb} {name}")


@checkpoints.command()
def prune(
    run: Run,
    keep_last: Annotated[int | None, Option(min=2, help="Number of newest checkpoints to keep.")] = None,
    keep_best: Annotated[
        int | None, Option(min=0, help="Number of best checkpoints, by the run's metric, to keep.")
    ] = None,
    keep_every: Annotated[int | None, Option(min=0, help="Keep the last checkpoint of every so many steps.")] = None,
    yes: Annotated[bool, Option("--yes", help="Delete; default: only show what would be deleted.")] = False,
    storage: StorageRoot = "./runs",
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints that retention does not keep. Defaults are the run's settings; pins are kept."""
    from outlast.checkpointing.tools import pin_and_prune as keeping

    store, retention = find_run(run, storage)
    given: dict[str, Any] = {"keep_last": keep_last, "keep_best": keep_best, "keep_every": keep_every}
    retention = replace(retention, **{key: number for key, number in given.items() if number is not None})
    plan = keeping.plan_prune(store, retention)
    if yes:
        plan = keeping.prune(store, plan)
    kept = [manifest.ref.name for manifest in plan.kept]
    if as_json:
        names = {
            "deleted": [manifest.ref.name for manifest in plan.doomed],
            "remains": [ref.name for ref in plan.remains],
            "kept": kept,
            "left": list(plan.left),
        }
        print_json({"done": yes, **names, "bytes": plan.num_bytes})
        return
    for manifest in plan.doomed:
        print_line(f"{'deleted' if yes else 'would delete'}  {manifest.ref.name}  {size(manifest.num_bytes)}")
    for ref in plan.remains:
        print_line(f"{'deleted' if yes else 'would delete'}  {ref.name}  rest of an interrupted deletion")
    for path in plan.left:
        print_line(f"{'left' if yes else 'would leave'}  {path}, which outlast did not write")
    print_line(f"{'kept' if yes else 'would keep'}  {', '.join(kept)}")
    if not yes and (plan.doomed or plan.remains):
        print_line(f"{size(plan.num_bytes)} would be freed; repeat the command with --yes to delete", to_stderr=True)


@checkpoints.command()
def export(
    run: Run,
    arguments: Annotated[
        Texts,
        Argument(
            metavar="[CHECKPOINT] [OUT]",
            help="The checkpoint (newest, best, model, a step, step@attempt; default: newest), and a new directory. "
            "No OUT with --weights, --config or --vocab.",
        ),
    ] = None,
    dtype: Annotated[str | None, Option(help="bf16, fp16 or fp32; default: as saved.")] = None,
    format_: Annotated[
        str | None, Option("--format", help="safetensors, or pytorch: pytorch_model.bin, a raw state_dict.")
    ] = None,
    old_vocab: Annotated[bool, Option("--old-vocab", help="Add vocab.txt, or vocab.json and merges.txt.")] = False,
    weights: Annotated[
        Path | None, Option(help="Write the weights to this file; as pytorch unless it ends with .safetensors.")
    ] = None,
    config: Annotated[Path | None, Option(help="Write the configuration to this file.")] = None,
    vocab: Annotated[
        Path | None,
        Option(help="Write the old-style vocabulary to this directory, or to this file if it is a single one."),
    ] = None,
    merge: Annotated[
        bool, Option("--merge", help="For an adapter: merge it into its base model, and write the result.")
    ] = False,
    card: Annotated[bool, Option("--card/--no-card", help="Write a model card, README.md, too.")] = True,
    base: Base = None,
    code: Code = None,
    trusted: Trusted = False,
    storage: StorageRoot = "./runs",
    as_json: AsJson = False,
) -> None:
    """Verify and copy a checkpoint as a plain Hugging Face directory, or parts of it to given paths."""
    from outlast.checkpointing.tools import query as commands
    from outlast.checkpointing.tools.export import check_free, converted, export_directory, export_parts, read_content

    parts = {"weights": weights, "config": config, "vocab": vocab}
    which, out = _which_and_out(arguments or [], any(parts.values()))
    if base and not merge:
        raise ConfigError("--base needs --merge", hint="give both, or omit --base")
    if old_vocab and out is None:
        raise ConfigError("--old-vocab needs OUT", hint="or give --vocab PATH, which writes the same files to PATH")
    if merge:
        make_code_importable(run, code)
    store, retention = find_run(run, storage)
    write, weights_name, caveat = _weights_format(format_, weights)
    to_dtype = _dtype(dtype)
    check_free([out] if out is not None else [path for path in (weights, config) if path is not None])
    checkpoint = commands.resolve_checkpoint(store, which, retention)
    content = read_content(checkpoint)
    if merge:
        from outlast.cluster.config.run_reference import user_trust
        from outlast.trainers.models.merge_lora import merge as merged

        content = merged(content, checkpoint.declaration, base, user_trust(run, (), trusted))
    if to_dtype is not None:
        content = converted(content, to_dtype)
    if out is not None:
        content = _add_card(checkpoint, content) if card else content
        export_directory(content, out, weights_name=weights_name, write_weights=write, old_vocab=old_vocab)
        written = [out]
    else:
        written = export_parts(content, **parts, write_weights=write)
    if caveat and (out is not None or weights is not None):
        print_line(f"outlast: {caveat}", to_stderr=True)
    paths = [str(path) for path in written]
    if as_json:
        print_json({"source": checkpoint.url, "written": paths})
    else:
        for path in paths:
            print_line(path)


def _add_card(checkpoint: ResolvedCheckpoint, content: Content) -> Content:
    """Add a model card, unless the model has one."""
    from outlast.cluster.monitoring.model_card import CARD
    from outlast.cluster.monitoring.model_card import model_card as write_card

    return replace(content, files={CARD: write_card(checkpoint, content), **content.files})


def _which_and_out(arguments: list[str], parts: bool) -> tuple[str, Path | None]:
    limit = 1 if parts else 2
    if len(arguments) > limit or not (arguments or parts):
        expected = "at most a CHECKPOINT, and no OUT," if parts else "OUT, or CHECKPOINT and OUT,"
        problem = f"export takes {expected} after RUN; given: {' '.join(arguments) or 'nothing'}"
        raise ConfigError(problem, hint="outlast checkpoints export RUN best OUT")
    if parts:
        return (arguments[0] if arguments else "newest"), None
    if is_url(arguments[-1]):
        problem = f"export writes to a local directory, not to {arguments[-1]}"
        raise ConfigError(problem, hint="name a directory, then copy it")
    if len(arguments) == 1 and re.fullmatch(r"newest|best|model|\d+(@[\w-]+)?", arguments[0]):
        hint = f"outlast checkpoints export RUN {arguments[0]} OUT, or ./{arguments[0]} for a directory of that name"
        raise ConfigError(f"{arguments[0]} is a checkpoint; the directory OUT is missing", hint=hint)
    return (arguments[0] if len(arguments) == 2 else "newest"), Path(arguments[-1])


def _weights_format(name: str | None, weights: Path | None) -> tuple[WriteWeights, str | None, str]:
    """Return the function that writes the weights, their file name (None: unchanged), and a caveat to print."""
    if name not in (None, "safetensors", "pytorch"):
        raise ConfigError(f"--format {name} is not known", hint="write --format safetensors or --format pytorch")
    if name == "pytorch" or (name is None and weights is not None and weights.suffix != ".safetensors"):
        from outlast.trainers.models.torch_save_export import CAVEAT, WEIGHTS_PYTORCH, write_state_dict

        return write_state_dict, WEIGHTS_PYTORCH, CAVEAT
    from outlast.checkpointing.tools.export import write_safetensors

    return write_safetensors, None, ""


def _dtype(name: str | None) -> Any:
    from outlast.checkpointing.tools.export import Dtype

    known = [dtype.value for dtype in Dtype]
    if name is not None and name not in known:
        raise ConfigError(f"--dtype {name} is not known", hint=f"write one of: {', '.join(known)}")
    return None if name is None else Dtype(name)
