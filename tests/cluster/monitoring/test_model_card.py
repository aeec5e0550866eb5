"""An export's model card: in the Hub's form, from the run's own record, and nothing made up."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.format.layout import RECORD, launch_dir
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.export import ADAPTER_WEIGHTS, Content, read_content
from outlast.checkpointing.tools.query import resolve_checkpoint
from outlast.cluster.monitoring.model_card import model_card
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import fault, run_group

OUTLAST = str(Path(sys.executable).with_name("outlast"))
SHARING = (Path(__file__).parents[3] / "docs/how-to/publish.md").read_text()


@pytest.fixture(scope="module")
def carded(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was killed once."""
    killed = fault(FaultPoint.STEP, 8, 0, FaultAction.SIGKILL, tmp_path_factory.mktemp("fired"))
    assert run_group(assign("carded", faults=(killed,)), storage, 2)[0].outcome is None
    assert run_group(assign("carded", launch="second"), storage, 2)[0].outcome is Outcome.DONE
    return storage.path("carded")


@pytest.fixture(scope="module")
def exported(carded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished model of that run, exported as a user would."""
    out = tmp_path_factory.mktemp("exports") / "my-model"
    done = subprocess.run(
        [OUTLAST, "checkpoints", "export", str(carded), "model", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_card_is_in_the_hubs_form(exported: Path, assign: Callable[..., Assignment]) -> None:
    found = ModelCard.load(exported / "README.md")
    data = found.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["outlast"]
    assert "license" not in data, "that is for the owner to say"
    assert "license: it is yours to choose" in (exported / "README.md").read_text()
    assert "base_model" not in data, "it was trained from scratch"
    results = found.data.eval_results
    assert results is not None
    [result] = results
    assert (result.metric_type, result.metric_name) == ("loss", "eval_loss")
    assert result.dataset_revision == assign("carded").prepared.fingerprint
    assert result.dataset_name == "topics.txt (5% held out)"
    assert result.metric_value == float(f"{result.metric_value:.6g}"), "no digits that mean nothing"


def test_the_card_says_what_the_run_went_through(
    exported: Path, carded: Path, storage: LocalStorage, assign: Callable[..., Assignment]
) -> None:
    text = (exported / "README.md").read_text()
    metrics = resolve_checkpoint(RunStore(storage, "carded"), "model", Retention()).manifest.metrics
    assert f"| eval_loss | {metrics['eval_loss']:.4f} |" in text
    assert "restarts survived: 1 (1 × driver lost)" in text
    assert "2 workers (ddp, cpu)" in text
    assert f"`{assign('carded').prepared.fingerprint}`" in text
    assert "lr: 0.001" in text
    assert str(carded.parent) not in text, "where things lie is nobody's business"


def test_the_base_model_and_the_commit_are_the_records(carded: Path, storage: LocalStorage) -> None:
    found = resolve_checkpoint(RunStore(storage, "carded"), "newest", Retention())
    content = read_content(found)
    place = f"{launch_dir('carded', found.manifest.launch)}/{RECORD}"
    for path, base in (("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("/models/mine", None), ("gpt2", "gpt2")):
        body = {"settings": {"model": {"path": path}}, "code": {"git": "0123abcd", "num_changed": 2}}
        storage.put(place, [json.dumps(body).encode()])
        said = ModelCard(model_card(found, content).decode())
        assert said.data.to_dict().get("base_model") == base
        assert "code at commit `0123abcd`, 2 files changed since" in said.content
        assert "/models/mine" not in said.content
        assert ("`mine`, a directory of the machine that trained it" in said.content) == (base is None)
    adapter = Content({}, {}, weights_name=ADAPTER_WEIGHTS)
    assert ModelCard(model_card(found, adapter).decode()).data.to_dict()["library_name"] == "peft"
    storage.delete(place)


def test_scores_belong_to_the_data_that_they_were_measured_on(
    carded: Path, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolve_checkpoint(RunStore(storage, "carded"), "model", Retention())
    settings = {"data": {"train": ["/secret/train.csv"], "eval": "/secret/test.csv"}}
    monkeypatch.setattr("outlast.cluster.monitoring.model_card.read_claim", lambda *_: {"settings": settings})
    said = ModelCard(model_card(found, read_content(found)).decode())
    [model] = said.data.to_dict()["model-index"]
    assert {result["dataset"]["name"] for result in model["results"]} == {"test.csv"}
    assert "## Metrics\n\nOn `test.csv`." in said.content
    assert "## Data\n\n`train.csv`" in said.content
    assert "/secret" not in said.content


def test_a_card_only_beside_a_directory_and_never_over_the_models_own(carded: Path, tmp_path: Path) -> None:
    command = [OUTLAST, "checkpoints", "export", str(carded)]
    done = subprocess.run([*command, str(tmp_path / "bare"), "--no-card"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "bare/README.md").exists()
    assert (tmp_path / "bare/config.json").is_file()
    done = subprocess.run([*command, "--config", str(tmp_path / "config.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "README.md").exists()


def test_a_card_that_the_model_brought_stays(carded: Path, storage: LocalStorage) -> None:
    from outlast.cluster.cli.checkpoints import _add_card

    found = resolve_checkpoint(RunStore(storage, "carded"), "newest", Retention())
    content = read_content(found)
    own = replace(content, files={**content.files, "README.md": b"mine"})
    assert _add_card(found, own).files["README.md"] == b"mine"


def code_of(heading: str) -> str:
    """The first Python block below a heading of docs/how-to/publish.md."""
    return (
        SHARING.split(f"# {heading}\n", 1)[1]
        .split("```python tests/cluster/monitoring/test_model_card.py\n")[1]
        .split("```")[0]
    )


def test_the_snippet_for_a_pipeline(exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code_of("Export it")], cwd=exported.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The function returns")


def test_git_would_give_the_weights_to_lfs(exported: Path, tmp_path: Path) -> None:
    [line] = re.findall(r"^echo '(.*)' > .gitattributes$", SHARING, re.MULTILINE)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitattributes").write_text(f"{line}\n")
    names = [path.name for path in exported.iterdir()]
    command = ["git", "-C", str(tmp_path), "check-attr", "filter", *names]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(line.split(":")[0] for line in said if line.endswith(": lfs")) == ["model.safetensors"]


def test_the_snippet_for_a_server(exported: Path) -> None:
    pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
    pytest.importorskip("uvicorn", reason="pip install fastapi uvicorn")
    (exported.parent / "serve.py").write_text(code_of("Behind a server"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--port", str(port)]
    server = subprocess.Popen(command, cwd=exported.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/generate",
            data=json.dumps({"text": "The function"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None
            try:
                body = json.loads(urllib.request.urlopen(request, timeout=60).read())
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(30)
    assert body["text"].startswith("The function")
