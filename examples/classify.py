"""Fine-tune GPT-2 for sequence classification: save every epoch, load the best model, predict on sample texts.

    python examples/classify.py [--model DIRECTORY_OR_HUB_ID] [--epochs 3] [--workers 1] [--dir classify]

Without --model, a small GPT-2 is made from scratch, so that the example runs with no network; with `--model gpt2` it is
the real one. The texts are docstrings of Python's own library, the classes the packages that they come from. Stop it at
any moment, kill it if you like, and run it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from outlast.cluster import Launch, RunConfig

PACKAGES = ("asyncio", "email", "tkinter", "unittest")
SAMPLES = (
    "Wait until the future is done and return the result of the coroutine.",
    "Return the payload of the message, decoded by its content transfer encoding header.",
    "Construct a canvas widget with the parent MASTER.",
    "Fail if the two objects are unequal as determined by the '==' operator.",
)


def write_data(path: Path) -> None:
    """Docstrings and the package that each comes from, as JSON lines."""
    with path.open("w") as file:
        for package in PACKAGES:
            for source in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                nodes = [node for node in ast.walk(ast.parse(source.read_bytes())) if isinstance(node, kinds)]
                for text in filter(None, map(ast.get_docstring, nodes)):
                    file.write(json.dumps({"text": text, "package": package}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained GPT-2; default: a small one from scratch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=Path("classify"))
    options = parser.parse_args()

    folder = options.dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "docstrings.jsonl")
    small = {
        "config": {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 64},
        "tokenizer": {"train_bpe": 2048},
    }
    settings = {
        "name": "classify",
        "seed": 1,
        "model": {"task": "sequence-classification", **({"path": options.model} if options.model else small)},
        "data": {"train": str(folder / "docstrings.jsonl"), "eval": "10%", "label": "package", "max_length": 64},
        "train": {
            "epochs": options.epochs,
            "batch": 32,
            "micro_batch": 16,
            "lr": 2e-5 if options.model else 1e-3,
            "warmup": 0.1,
            "eval_every": "1 epoch",
        },
        "scale": {"workers": options.workers},
        "checkpoint": {
            "storage": str(folder / "runs"),
            "every": "1 epoch",
            "keep_best": 1,
            "metric": "eval_accuracy",
            "metric_mode": "max",
            "load_best": True,
        },
    }

    def show(event: dict) -> None:
        if event["event"] == "eval":
            print(f"step {event['step']:4}  loss {event['eval_loss']:.3f}  accuracy {event['eval_accuracy']:.3f}")

    finished = Launch(RunConfig.model_validate(settings), settings, tell=show).run()
    if finished.model is None:
        raise SystemExit(finished.outcome.exit_code)

    best = folder / "runs" / finished.model
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(best), AutoTokenizer.from_pretrained(best)
    model.eval()
    for text in SAMPLES:
        with torch.no_grad():
            probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        number = int(probabilities.argmax())
        print(f"{model.config.id2label[number]:9} {probabilities[number]:4.0%}  {text}")
    print(f"the best model lies in {best}")


if __name__ == "__main__":
    main()
