"""The shape of the code: three rooms, imports in one direction, a public face that is frozen, no pickle."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

import outlast.checkpointing
import outlast.cluster
import outlast.trainers
from outlast.checkpointing.format.layout import checkpoint_dir
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.storage.local import LocalStorage
from tests.conftest import Reference
from tests.support.decoded_safetensors import decode

ROOT = Path(__file__).parents[1]
ROOMS = ["checkpointing", "trainers", "cluster"]
FORBIDDEN = {
    "checkpointing": ["outlast.trainers", "outlast.cluster", "transformers", "accelerate", "ray", "tests"],
    "trainers": ["outlast.cluster", "ray", "tests"],
    "cluster": ["tests"],
}
MAX_LINES = 500
FACES = [outlast.checkpointing, outlast.trainers, outlast.cluster]


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    assert sources(room)
    wrong = [
        f"{path.name} imports {name}"
        for path in sources(room)
        for name in imports(path)
        for forbidden in FORBIDDEN[room]
        if name == forbidden or name.startswith(f"{forbidden}.")
    ]
    assert wrong == []


def test_the_scan_sees_an_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    import ray.train as t\n    from outlast import cluster\n")
    assert set(imports(path)) >= {"ray.train", "outlast.cluster"}


@pytest.mark.parametrize("room", ROOMS)
def test_every_folder_is_a_package_of_the_wheel(room: str) -> None:
    """A sub-package that pyproject.toml does not list imports when editable and is silently missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in sources(room)}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    names = {"outlast." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names == {name for name in listed if f"{name}.".startswith(f"outlast.{room}.")}
    assert (ROOT / room / "py.typed").is_file()


def test_no_import_circle() -> None:
    """Imports inside functions and for type checkers alone count too."""
    assert circles(modules_imported()) == []


@pytest.mark.parametrize("room", ROOMS)
def test_the_folders_of_a_room_form_a_dag(room: str) -> None:
    """A module that stands beside the folders counts as a folder of its own."""
    folders: dict[str, set[str]] = {}
    for module, imported in modules_imported().items():
        if module.split(".")[1] == room:
            folders.setdefault(folder(module), set()).update(folder(name) for name in imported if f".{room}." in name)
    assert circles({name: others - {name} for name, others in folders.items()}) == []


def test_ray_is_imported_where_it_belongs() -> None:
    allowed = ("driver/", "fault_tolerance/", "jobs/", "preflight/", "ray_internals.py")
    found = {
        str(path.relative_to(ROOT / "cluster"))
        for path in sources("cluster")
        if any(name == "ray" or name.startswith("ray.") for name in imports(path))
    }
    assert [path for path in sorted(found) if not path.startswith(allowed)] == []
    assert len(found) > 5


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_no_folder_holds_more_than_15_files(room: str) -> None:
    counts = Counter(path.parent.relative_to(ROOT) for path in sources(room) if path.name != "__init__.py")
    assert {str(place): count for place, count in counts.items() if count > 15} == {}


def test_a_public_class_has_a_name_of_its_own() -> None:
    """So that a search for a class gives one answer."""
    found = Counter(
        node.name
        for room in ROOMS
        for path in sources(room)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in found.items() if count > 1] == []


def modules_imported() -> dict[str, set[str]]:
    """For each module of the three rooms, the others of them that it imports; packages are no modules here."""
    paths = {
        "outlast." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for room in ROOMS
        for path in sources(room)
        if path.name != "__init__.py"
    }
    return {name: {other for other in imports(path) if other in paths} - {name} for name, path in paths.items()}


def folder(module: str) -> str:
    """`outlast.room.folder[.folder]` of a module in a folder; the module itself where it stands beside them."""
    parts = module.split(".")
    return ".".join(parts[:-1]) if len(parts) > 3 else module


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """What is left when everything is taken away that imports nothing (more), again and again."""
    left = {name: set(others) for name, others in graph.items()}
    while leaves := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in leaves}
    return [sorted(left)] if left else []


def test_the_search_sees_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_no_file_holds_two_ideas(room: str) -> None:
    long = {path.name: count for path in sources(room) if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert long == {}


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_says_what_it_is_for(room: str) -> None:
    silent = [
        path.name
        for path in sources(room)
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


# -- journal events ----------------------------------------------------------------------------------------------------


def event_literals(path: Path) -> list[int]:
    """Lines that make an event of a dict, or compare its kind with a string; `run_store/events.py` has the classes."""

    def is_kind(node: ast.AST) -> bool:
        found = node.slice if isinstance(node, ast.Subscript) else None
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            found = node.args[0]
        return isinstance(found, ast.Constant) and found.value == "event"

    def is_text(node: ast.AST | None) -> bool:
        return isinstance(node, ast.Constant) and isinstance(node.value, str)

    def is_literal(node: ast.AST) -> bool:
        match node:
            case ast.Dict():
                pairs = zip(node.keys, node.values, strict=True)
                return any(isinstance(key, ast.Constant) and key.value == "event" and is_text(it) for key, it in pairs)
            case ast.Compare():
                compared = [node.left, *node.comparators]
                texts = [item for side in compared for item in getattr(side, "elts", [side])]
                return any(map(is_kind, compared)) and any(map(is_text, texts))
            case ast.Match():
                return is_kind(node.subject)
        return False

    return [getattr(node, "lineno", 0) for node in ast.walk(ast.parse(path.read_text())) if is_literal(node)]


@pytest.mark.parametrize("room", ROOMS)
def test_events_are_constructed_and_matched_as_classes(room: str) -> None:
    assert {path.name: found for path in sources(room) if (found := event_literals(path))} == {}


def test_the_scan_sees_an_event_literal(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    lines = [
        'a = {"event": "step", "step": 1}',
        'b = e["event"] == "step"',
        'c = e.get("event") in ("step", "eval")',
        'd = {"event": e.kind}',
        'f = e["event"] == StepEvent.kind',
        'match e["event"]:',
        '    case "step":',
        "        pass",
    ]
    path.write_text("\n".join(lines) + "\n")
    assert sorted(event_literals(path)) == [1, 2, 3, 6]


# -- the public face ---------------------------------------------------------------------------------------------------


def test_the_face_of_checkpointing_is_frozen() -> None:
    assert outlast.checkpointing.__all__ == [
        "Catalog",
        "CheckpointRef",
        "Checkpointer",
        "ConfigError",
        "DamagedError",
        "Every",
        "LocalStorage",
        "Manifest",
        "Naming",
        "NoCheckpointError",
        "OutlastError",
        "PreflightError",
        "RankGroup",
        "Ranks",
        "Retention",
        "SaveInterval",
        "Storage",
        "StorageError",
        "StorageRefused",
        "WeightNaming",
        "catalogue",
        "newest_sealed",
        "open_storage",
        "read_catalog",
        "seal",
        "verify",
    ]


def test_the_face_of_trainers_is_frozen() -> None:
    assert outlast.trainers.__all__ == [
        "Assignment",
        "Column",
        "ColumnType",
        "Control",
        "Loop",
        "Outcome",
        "Prepared",
        "SealCheckpoints",
        "Task",
        "TrainingConfig",
        "World",
        "prepare",
        "run_attempt",
    ]


def test_the_face_of_cluster_is_frozen() -> None:
    assert outlast.cluster.__all__ == [
        "Finished",
        "Launch",
        "Report",
        "RunConfig",
        "RunFailed",
        "load_run",
        "run_report",
    ]


@pytest.mark.parametrize("package", FACES, ids=lambda package: package.__name__)
def test_every_name_is_there(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        package.Nothing  # type: ignore[attr-defined]  # noqa: B018


def test_a_package_costs_nothing_until_it_is_used() -> None:
    code = (
        "import sys, outlast.checkpointing, outlast.trainers, outlast.cluster;"
        "print([name for name in ('torch', 'ray', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- no pickle ---------------------------------------------------------------------------------------------------------

PICKLES = ["pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load", "torch.save", "torch.jit"]


def dotted(node: ast.AST) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def pickles(path: Path) -> list[str]:
    used = {
        dotted(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute | ast.Name)
    }
    return sorted(name for name in {*used, *imports(path)} if any(name in (p, f"from {p}") for p in PICKLES))


def test_checkpointing_knows_no_pickle() -> None:
    assert {path.name: found for path in sources("checkpointing") if (found := pickles(path))} == {}


def test_the_scan_sees_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import pickle\nimport torch\nfrom torch import save\ntorch.load('a')\n")
    assert pickles(path) == ["pickle", "torch.load", "torch.save"]


def test_a_checkpoint_holds_tensors_and_json_alone(
    storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    run = reference(2).run
    files = [path for path in storage.path(run).rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            assert decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        else:
            assert path.suffix in (".json", ".jsonl"), path
            for text in data.splitlines() if path.suffix == ".jsonl" else [data]:
                assert isinstance(json.loads(text), dict)


def test_transformers_alone_opens_a_checkpoint(
    storage: LocalStorage, reference: Callable[[int], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every committed checkpoint, and the model at the end, without a word from outlast."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = reference(2).run
    accepted = read_catalog(storage, run).accepted
    folders = [storage.path(checkpoint_dir(run, item.ref)) for item in accepted]
    assert len(folders) == 3
    for folder in [*folders, folders[0].parent / "model"]:
        model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not said["missing_keys"]
        assert not said["unexpected_keys"]
        saved = decode(torch.frombuffer(bytearray((folder / "model.safetensors").read_bytes()), dtype=torch.uint8))
        for name, tensor in saved.items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert (
            AutoTokenizer.from_pretrained(folder).decode(AutoTokenizer.from_pretrained(folder)("words")["input_ids"])
            == "words"
        )
