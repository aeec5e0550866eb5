"""`outlast demo`: kills a worker during a save, resumes, and compares the result with that of an undisturbed run.

Nothing is simulated, and nothing is downloaded. It must write only to its own folder.
"""

import ast
import json
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.checkpointing.run_store.events import EvalEvent, ResumeEvent
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.query import find_model
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.drills import drill
from outlast.cluster.drills.comparison import events_of, final_state
from outlast.cluster.driver.ray_session import ray_session
from outlast.cluster.formatting import counted
from outlast.cluster.monitoring.console_progress import ProgressReporter
from outlast.cluster.output import make_console
from outlast.trainers.config.train import Precision
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.evaluation import evaluate
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tasks.causal_lm import CausalLM

NUM_STEPS = 100
SAVE_EVERY = 10
KILL_AT = 50
KILLED_RANK = 1


def run_demo(folder: Path) -> dict[str, Any]:
    """Run the demo in a new subdirectory of `folder`, print a summary, and return the findings."""
    console = make_console(stderr=True)
    directory = folder.absolute() / time.strftime("%Y%m%d-%H%M%S")
    directory.mkdir(parents=True)
    parts: dict[str, float] = {}

    about = "[bold]outlast demo[/]: a small GPT-2 on two workers, one of which is killed. About two minutes."
    console.print(about, markup=True)
    with _timed(parts, "text"):
        num_texts = write_texts(directory / "texts.jsonl")
    killed, undisturbed = _config(directory, "killed"), _config(directory, "undisturbed")
    with _timed(parts, "data"):
        prepared = prepare(killed, LocalStorage(directory / "runs"))
    console.print(f"  {num_texts:,} texts from Python's own documentation, {prepared.num_tokens['train']:,} tokens")
    with ExitStack() as stack:
        with _timed(parts, "ray"):
            stack.enter_context(ray_session())
        with _timed(parts, "killed run"), ProgressReporter("killed run") as reporter:
            copy = drill.RunCopy(killed, _declared(killed), KILL_AT)
            drill.inject(copy, drill.FaultKind.KILL_IN_SAVE, reporter, KILLED_RANK)
        with _timed(parts, "undisturbed run"), ProgressReporter("undisturbed run") as reporter:
            drill.RunCopy(undisturbed, _declared(undisturbed), 0).launch(tell=reporter)
    with _timed(parts, "comparison"):
        findings = _compare(copy)
    model_info = find_model(copy.store)
    assert model_info is not None
    model = directory / "runs" / model_info.path
    with _timed(parts, "plain transformers"):
        findings |= _load_without_outlast(model, killed, prepared)
    findings |= {"parts_s": {name: round(s, 2) for name, s in parts.items()}}
    findings |= {"run": str(directory / "runs/killed"), "model": str(model)}
    _summary(console, findings)
    return findings


def write_texts(path: Path) -> int:
    """Write the help topics and docstrings of the standard library as JSON lines. Return their number."""
    texts = [topic for _, topic in sorted(pydoc_data.topics.topics.items())]
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(source.read_bytes())
        node_types = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, node_types))
        texts += [text for text in docstrings if text and len(text) > 80]
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return len(texts)


def _config(directory: Path, name: str) -> RunConfig:
    body = {
        "name": name,
        "seed": 7,
        "model": {
            "config": {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128},
            "tokenizer": {"train_bpe": 1024},
        },
        "data": {"train": str(directory / "texts.jsonl"), "eval": "2%", "max_length": 128},
        "train": {"steps": NUM_STEPS, "batch": 16, "micro_batch": 4, "lr": 2e-3, "warmup": 0.2, "eval_every": 50},
        "scale": {"workers": 2},
        "failure": {"in_place": False},
        "checkpoint": {"storage": str(directory / "runs"), "every": SAVE_EVERY},
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    return RunConfig.model_validate(body)


def _declared(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_defaults=True)


@contextmanager
def _timed(parts: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    parts[name] = time.monotonic() - began


def _compare(copy: drill.RunCopy) -> dict[str, Any]:
    store = copy.store
    killed, undisturbed = final_state(store), final_state(RunStore(store.storage, "undisturbed"))
    result = drill.compare_with_reference(copy, drill.FaultKind.KILL_IN_SAVE, undisturbed)
    losses, num_resumed = killed.losses, len(events_of(store, ResumeEvent))
    return {
        "equal": {
            "weights": bool(killed.weights) and killed.weights == undisturbed.weights,
            "optimizer": bool(killed.optimizer) and killed.optimizer == undisturbed.optimizer,
            "losses": len(losses) == NUM_STEPS and losses == undisturbed.losses,
        },
        "kills": num_resumed if result.fault else 0,
        "recovery_s": result.seconds,
        "lost_steps": result.redone,
        "kill": result.fault,
        "resumed_from": result.resumed_from,
        "num_tensors": len(killed.weights) + len(killed.optimizer),
        "checkpoints": [item.ref.step for item in build_catalog(store).accepted],
        "eval_loss": {e.step: e.scores["eval_loss"] for e in events_of(store, EvalEvent)},
        "loss": {step: min(filter(None, losses[step])) for step in (1, NUM_STEPS) if step in losses},
    }


def _load_without_outlast(model_dir: Path, config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """Load the model with plain transformers, and evaluate it again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    storage = LocalStorage(Path(config.checkpoint.storage))
    task = CausalLM(config.data, prepared.tokenizer(storage), prepared.facts)
    loss = evaluate(model, task, prepared.split(storage, "eval"), World(), 4, Precision.FP32)["eval_loss"]
    prompt = tokenizer("The class of an object", return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return {"eval_loss_loaded": loss, "sample": tokenizer.decode(tokens[0])}


def _summary(console: Console, findings: dict[str, Any]) -> None:
    kill, evals = findings["kill"], findings["eval_loss"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("trained", f"{NUM_STEPS} steps, loss {findings['loss'][1]:.3f} → {findings['loss'][NUM_STEPS]:.3f}")
    if kill:
        victim = f"rank {kill['rank']} (pid {kill['pid']}) by SIGKILL, while writing checkpoint-{kill['step']}"
        table.add_row("killed", victim)
        after = f"first new step {findings['recovery_s']:.1f} s after the kill"
        table.add_row("resumed", f"from checkpoint-{findings['resumed_from']}; {after}")
        table.add_row("repeated", counted(findings["lost_steps"], "step"))
    table.add_row("checkpoints kept", ", ".join(map(str, sorted(findings["checkpoints"]))))
    loaded = f"{findings['eval_loss_loaded']:.3f} with from_pretrained"
    table.add_row("evaluation loss", f"{evals[0]:.3f} before, {evals[NUM_STEPS]:.3f} after; {loaded}")
    table.add_row("sample", f"{findings['sample']!r} (gibberish: the model is small, the training short)")
    for name, same in findings["equal"].items():
        verdict = Text("equal", "green") if same else Text("DIFFERENT", "bold red")
        table.add_row(name, Text.assemble(verdict, " to the undisturbed run"))
    for name in ("run", "model"):
        table.add_row(name, findings[name])
    console.print()
    console.print(table)
    if all(findings["equal"].values()):
        digests = f"all {findings['num_tensors']} SHA-256 digests and all {NUM_STEPS} losses agree"
        console.print(f"\n[bold green]The killed run ended with the same bits[/]: {digests}.", markup=True)
    else:
        failed = "\n[bold red]The two runs differ.[/] This is a bug; please report it with the folder above."
        console.print(failed, markup=True)
