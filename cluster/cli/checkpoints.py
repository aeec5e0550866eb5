"""The `checkpoints` verbs: each finds its run, calls one function, prints what comes back."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.options import AsJson, Base, Code, Root, Run, Trusted, bring_code
from outlast.cluster.config.run_reference import find_run
from outlast.cluster.formatting import size, when

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.retention import Retention
    from outlast.checkpointing.run_store.store import RunStore
    from outlast.checkpointing.tools.diff import CheckpointDiff
    from outlast.checkpointing.tools.export import Content, Dtype, WriteWeights
    from outlast.checkpointing.tools.pin_and_prune import PrunePlan
    from outlast.checkpointing.tools.query import ResolvedCheckpoint

checkpoints = typer.Typer(help="Look at a run's checkpoints, keep them, take them elsewhere.", no_args_is_help=True)

Which = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="newest, best, a step, or step@attempt.")]


@checkpoints.command("ls")
def list_(run: Run, storage: Root = "./runs", as_json: AsJson = False) -> None:
    """List the checkpoints that count, newest first."""
    from outlast.checkpointing.tools import query as commands

    store, retention = find_run(run, storage)
    catalog = commands.load_catalog(store)
    rows = commands.list_checkpoints(store, catalog, retention)
    for item in catalog.rejected:
        print(f"damaged: {item.ref}: {'; '.join(item.reasons)}", file=sys.stderr)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'step':>8}  {'size':>9}  {'committed':19}  metrics")
    for row in rows:
        metrics = "  ".join(f"{key} {value:.4f}" for key, value in sorted(row["metrics"].items()))
        marks = "".join(f"  {mark}" for mark in ("best", "pinned") if row[mark])
        print(f"{row['step']:>8}  {size(row['bytes']):>9}  {when(row['committed_at'])}  {metrics}{marks}")


@checkpoints.command()
def show(
    run: Run,
    which: Which = "newest",
    storage: Root = "./runs",
    as_json: AsJson = False,
) -> None:
    """Show one checkpoint: its files, digests, metrics, and what it stands on."""
    from outlast.checkpointing.tools import query as commands

    store, retention = find_run(run, storage)
    body = commands.show_checkpoint(store, which, retention)
    if as_json:
        print(json.dumps(body, indent=1))
        return
    pinned = ", pinned" if body["pinned"] else ""
    print(f"checkpoint-{body['step']} by attempt {body['attempt']}, committed {when(body['committed_at'])}{pinned}")
    print(f"{body['path']}\n{size(body['bytes'])} by {body['world_size']} ranks; metrics {body['metrics']}")
    print(f"stands on: {', '.join(body['lineage']) or 'nothing'}")
    if body["record"]:
        print(f"made of: {body['record']}")
    for entry in body["files"]:
        print(f"  {entry['xxh3_128']}  {size(entry['num_bytes']):>9}  {entry['path']}")


@checkpoints.command()
def verify(
    run: Run,
    which: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help="Only this one: newest, best, model, a step, or step@attempt."),
    ] = None,
    storage: Root = "./runs",
    as_json: AsJson = False,
) -> None:
    """Read every byte and compare with what was committed. Exit code 5 if anything is damaged."""
    from dataclasses import asdict

    from outlast.checkpointing.tools import query as commands

    store, retention = find_run(run, storage)
    verdicts = commands.verify_run(store, which, retention)
    if as_json:
        print(json.dumps([asdict(item) for item in verdicts], indent=1))
    else:
        for item in verdicts:
            print(f"{'damaged' if item.faults else 'whole':8} {size(item.num_bytes):>9}  {item.path}")
            for fault in item.faults:
                print(f"         {fault}")
        if not verdicts:
            print("no checkpoints yet", file=sys.stderr)
    raise typer.Exit(5 if any(item.faults for item in verdicts) else 0)


@checkpoints.command()
def path(
    run: Run,
    which: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="newest, best, model, a step, or step@attempt.")
    ] = "newest",
    storage: Root = "./runs",
) -> None:
    """Print where a checkpoint lies, for `from_pretrained`."""
    from outlast.checkpointing.tools import query as commands

    store, retention = find_run(run, storage)
    print(commands.path_of(store, which, retention))


@checkpoints.command()
def diff(
    run: Run,
    first: Annotated[str, typer.Argument(metavar="A", help="newest, best, model, a step, or step@attempt.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    other: Annotated[str | None, typer.Option("--with", metavar="RUN", help="The run that B is of.")] = None,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Compare the optimizer's state too.")] = False,
    storage: Root = "./runs",
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints, tensor by tensor, and the settings that they were made with."""
    from outlast.checkpointing.tools import query as commands
    from outlast.checkpointing.tools.diff import diff_checkpoints

    store, retention = find_run(run, storage)
    ours = commands.resolve_checkpoint(store, first, retention)
    if other is not None:
        store, retention = find_run(other, storage)
    theirs = commands.resolve_checkpoint(store, second, retention)
    found = diff_checkpoints(ours, theirs, optimizer=optimizer)
    if as_json:
        body = {
            "a": ours.url,
            "b": theirs.url,
            "settings": found.settings,
            "tensors": [item.as_json() for item in found.tensors],
        }
        print(json.dumps(body, indent=1))
        return
    print(f"a  {ours.url}\nb  {theirs.url}")
    _print_comparison(found)


def _print_comparison(found: CheckpointDiff) -> None:
    from outlast.checkpointing.tools.diff import SettingChange

    for key, pair in (found.settings or {}).items():
        print(f"{key}: {pair[0]!r} → {pair[1]!r}")
    if not found.settings:
        print("the settings cannot be told" if found.settings is None else "the settings are the same")
    print("tensors: " + ", ".join(f"{found.count(change)} {change.value}" for change in SettingChange))
    different = [item for item in found.tensors if item.change is not SettingChange.EQUAL]
    if different:
        print(f"{'':8}  {'norm of a':>11}  {'norm of b':>11}  {'of b - a':>11}  {'largest':>11}  name")
    for item in different:
        numbers = (*item.norms, item.distance, item.largest)
        shown = "  ".join(f"{'-' if number is None else format(number, '.5g'):>11}" for number in numbers)
        kinds = [
            f"{kind} {list(shape)}" for kind, shape in zip(item.dtypes, item.shapes, strict=True) if shape is not None
        ]
        print(f"{item.change.value:8}  {shown}  {item.name} {' → '.join(dict.fromkeys(kinds))}")


@checkpoints.command()
def pin(run: Run, which: Which, storage: Root = "./runs", as_json: AsJson = False) -> None:
    """Keep a checkpoint whatever retention says, also of a run that is at work."""
    from outlast.checkpointing.tools import pin_and_prune as keeping

    store, retention = find_run(run, storage)
    ref = keeping.pin(store, which, retention)
    print(json.dumps({"pinned": ref.name}) if as_json else f"pinned {ref.name}")


@checkpoints.command()
def unpin(
    run: Run,
    which: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A step, or step@attempt.")],
    storage: Root = "./runs",
    as_json: AsJson = False,
) -> None:
    """Take a pin back; the checkpoint goes when retention next lets it."""
    from outlast.checkpointing.tools import pin_and_prune as keeping

    store, _ = find_run(run, storage)
    ref = keeping.unpin(store, which)
    print(json.dumps({"unpinned": ref.name}) if as_json else f"unpinned {ref.name}")


@checkpoints.command()
def prune(
    run: Run,
    keep_last: Annotated[int | None, typer.Option(min=2, help="The newest so many stay.")] = None,
    keep_best: Annotated[int | None, typer.Option(min=0, help="The best so many by the run's metric stay.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=0, help="Of every so many steps the last stays.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only show what would go.")] = False,
    storage: Root = "./runs",
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints that nothing keeps. What is not given is as in the run's own settings; pins hold."""
    from dataclasses import replace

    from outlast.checkpointing.tools import pin_and_prune as keeping

    store, retention = find_run(run, storage)
    retention = replace(
        retention,
        keep_last=retention.keep_last if keep_last is None else keep_last,
        keep_best=retention.keep_best if keep_best is None else keep_best,
        keep_every=retention.keep_every if keep_every is None else keep_every,
    )
    plan = keeping.plan_prune(store, retention)
    if yes:
        plan = keeping.prune(store, plan)
    if as_json:
        print(json.dumps(_prune_as_json(plan, yes), indent=1))
        return
    for manifest in plan.doomed:
        print(f"{'deleted' if yes else 'would delete'}  {manifest.ref.name}  {size(manifest.num_bytes)}")
    for ref in plan.remains:
        print(f"{'deleted' if yes else 'would delete'}  {ref.name}  what an interrupted deletion left")
    print(f"{'kept' if yes else 'would keep'}  {', '.join(manifest.ref.name for manifest in plan.kept)}")
    if not yes and (plan.doomed or plan.remains):
        print(f"{size(plan.num_bytes)} would be free; the same command with --yes deletes", file=sys.stderr)


def _prune_as_json(plan: PrunePlan, done: bool) -> dict[str, Any]:
    return {
        "done": done,
        "deleted": [manifest.ref.name for manifest in plan.doomed],
        "remains": [ref.name for ref in plan.remains],
        "kept": [manifest.ref.name for manifest in plan.kept],
        "bytes": plan.num_bytes,
    }


@checkpoints.command()
def export(
    run: Run,
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT] [OUT]",
            help="Which (newest, best, model, a step, step@attempt; default: newest), and a directory to make. "
            "No OUT with --weights, --config or --vocab.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as it was saved.")] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="safetensors, or pytorch: pytorch_model.bin, a raw state_dict."),
    ] = None,
    old_vocab: Annotated[
        bool, typer.Option("--old-vocab", help="Add vocab.txt, or vocab.json and merges.txt.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(help="Write the weights to this file; pytorch unless it ends with .safetensors."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Write the configuration to this file.")] = None,
    vocab: Annotated[
        Path | None, typer.Option(help="Write old-style vocabulary to this directory; or file, where it is one.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of an adapter: add it to the model beneath, and write the whole.")
    ] = False,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Beside the model: README.md, its model card.")] = True,
    base: Base = None,
    code: Code = None,
    trusted: Trusted = False,
    storage: Root = "./runs",
    as_json: AsJson = False,
) -> None:
    """Copy a checkpoint, verified, as a plain Hugging Face directory, or its parts to paths of your choice."""
    parts = {"weights": weights, "config": config, "vocab": vocab}
    which, out = _which_and_out(places or [], any(parts.values()))
    if base and not merge:
        raise ConfigError("--base goes with --merge", hint="give both, or leave --base out")
    if old_vocab and out is None:
        raise ConfigError("--old-vocab goes with OUT", hint="--vocab PATH writes such files to a path of your choice")
    if merge:
        bring_code(run, code)
    merging = {"base": base, "trusted": trusted} if merge else None
    source, written = _export(
        find_run(run, storage),
        which,
        out,
        parts,
        _weights_format(format_, weights),
        _dtype(dtype),
        old_vocab,
        merging,
        with_card=card,
    )
    paths = [str(path) for path in written]
    print(json.dumps({"source": source, "written": paths}, indent=1) if as_json else "\n".join(paths))


def _export(
    found_run: tuple[RunStore, Retention],
    which: str,
    out: Path | None,
    parts: dict[str, Path | None],
    form: tuple[WriteWeights, str | None, str],
    dtype: Dtype | None,
    old_vocab: bool,
    merging: dict[str, Any] | None,
    *,
    with_card: bool,
) -> tuple[str, list[Path]]:
    """Writes what `export` was asked for. Returns what it was made of, and what was written."""
    from outlast.checkpointing.tools import query as commands
    from outlast.checkpointing.tools.export import check_free, converted, export_directory, export_parts, read_content

    write, weights_name, caveat = form
    check_free([out] if out is not None else [path for path in (parts["weights"], parts["config"]) if path is not None])
    store, retention = found_run
    found = commands.resolve_checkpoint(store, which, retention)
    content = read_content(found)
    if merging is not None:
        from outlast.trainers.models.merge_lora import merge as merged

        content = merged(content, found.declaration, **merging)
    if dtype is not None:
        content = converted(content, dtype)
    if out is not None:
        if with_card:
            content = _with_card(found, content)
        export_directory(content, out, weights_name=weights_name, write_weights=write, old_vocab=old_vocab)
        written = [out]
    else:
        written = export_parts(content, **parts, write_weights=write)
    if caveat and (out is not None or parts["weights"] is not None):
        print(f"outlast: {caveat}", file=sys.stderr)
    return found.url, written


def _with_card(found: ResolvedCheckpoint, content: Content) -> Content:
    """The same with a model card, unless the model brought one."""
    from dataclasses import replace

    from outlast.cluster.monitoring.model_card import CARD
    from outlast.cluster.monitoring.model_card import model_card as write_card

    return replace(content, files={CARD: write_card(found, content), **content.files})


def _which_and_out(places: list[str], parts: bool) -> tuple[str, Path | None]:
    most = 1 if parts else 2
    if len(places) > most or not (places or parts):
        wanted = "at most a CHECKPOINT, and no OUT," if parts else "OUT, or CHECKPOINT and OUT,"
        raise ConfigError(
            f"export takes {wanted} after RUN; given: {' '.join(places) or 'nothing'}",
            hint="outlast checkpoints export RUN best OUT",
        )
    if parts:
        return (places[0] if places else "newest"), None
    if "://" in places[-1]:
        raise ConfigError(
            f"export writes to a local directory, not to {places[-1]}", hint="name a directory, then copy it"
        )
    if len(places) == 1 and re.fullmatch(r"newest|best|model|\d+(@[\w-]+)?", places[0]):
        raise ConfigError(
            f"{places[0]} names a checkpoint; a directory to make is missing",
            hint=f"outlast checkpoints export RUN {places[0]} OUT, or ./{places[0]} for a directory of that name",
        )
    return (places[0] if len(places) == 2 else "newest"), Path(places[-1])


def _weights_format(name: str | None, weights: Path | None) -> tuple[WriteWeights, str | None, str]:
    """Who writes the weights, their file's name in a directory (None: as it is), and what is to be said about them."""
    if name not in (None, "safetensors", "pytorch"):
        raise ConfigError(f"--format {name} is not known", hint="write --format safetensors or --format pytorch")
    if name == "pytorch" or (name is None and weights is not None and weights.suffix != ".safetensors"):
        from outlast.trainers.models.torch_export import CAVEAT, WEIGHTS_PYTORCH, write_state_dict

        return write_state_dict, WEIGHTS_PYTORCH, CAVEAT
    from outlast.checkpointing.tools.export import write_safetensors

    return write_safetensors, None, ""


def _dtype(name: str | None) -> Any:
    from outlast.checkpointing.tools.export import Dtype

    known = [dtype.value for dtype in Dtype]
    if name is not None and name not in known:
        raise ConfigError(f"--dtype {name} is not known", hint=f"write one of: {', '.join(known)}")
    return None if name is None else Dtype(name)
