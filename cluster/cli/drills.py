"""The commands that inject faults: `demo` and `drill`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Exit, Option

from outlast.cluster.cli.options import AsJson, Overrides, RunFile, Texts, writing
from outlast.cluster.output import print_json, to_json


def demo(
    folder: Annotated[Path, Option("--dir", help="The folder to write to.")] = Path("outlast-demo"),
    json_file: Annotated[Path | None, Option("--json", metavar="FILE", help="Write the findings as JSON.")] = None,
) -> None:
    """Train on two workers, kill one during a save, resume, and compare with an undisturbed run.

    Exit code 1 if one bit differs.
    """
    from outlast.cluster.drills.demo import run_demo

    findings = run_demo(folder)
    if json_file is not None:
        with writing(json_file):
            json_file.write_text(to_json(findings) + "\n")
    raise Exit(0 if all(findings["equal"].values()) else 1)


def drill(
    run_file: RunFile,
    overrides: Overrides = None,
    faults: Annotated[
        Texts,
        Option(
            "--fault",
            metavar="FAULT",
            help="in-place, kill, kill-in-save, error, stop, damage or driver; repeatable. All.",
        ),
    ] = None,
    steps: Annotated[int, Option(help="Steps of each copy.")] = 12,
    address: Annotated[str | None, Option(help="A Ray cluster; default: a new local one.")] = None,
    keep: Annotated[bool, Option("--keep", help="Keep the copies in the storage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Inject faults into short copies of your run; check that each resumes with the same bits, and how fast.

    Exit code 1 if one does not.
    """
    from outlast.cluster.drills.drill import parse_faults, run_drill

    results = run_drill(
        run_file,
        overrides or [],
        kinds=parse_faults(faults) if faults else None,
        num_steps=steps,
        address=address,
        keep=keep,
    )
    if as_json:
        print_json([asdict(finding) for finding in results])
    raise Exit(0 if all(finding.is_good for finding in results) else 1)
