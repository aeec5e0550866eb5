"""Every state in which a crash may leave a disk, from what a writer asked of it.

`Effects` records the system calls of a real `LocalStorage`: write, fsync, rename, mkdir, unlink, rmdir. `Disk` applies
them to a model of a file system that keeps only what was synced: a file's bytes from its own fsync on, a directory's
names from the directory's fsync on. What is not synced may be there or not:

- a file's bytes: none, the first half, all, or as many zeros;
- a directory's names: every subset of the changes since its last sync when these are at most three; of more, every
  prefix, every single one, and all but any one. A rename is one change;
- several of them at once: in every combination while no more than three files and directories are not synced; of more,
  each in all of its states while the others have kept everything, and while the others have kept nothing.

A file system that orders its journal allows fewer states.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from types import TracebackType
from typing import Any

Effect = tuple[Any, ...]  #: such as ("write", path, data), ("sync", path), ("rename", path, path)
Tree = dict[str, bytes | None]  #: every path of a state; None for a directory
_PATCHED = ("write", "fsync", "replace", "mkdir", "unlink", "rmdir")


class Effects:
    """While entered, writes down what this process does to files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: list[Effect] = []
        self._real: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Effects:
        self._real = {name: getattr(os, name) for name in _PATCHED}
        for name in _PATCHED:
            setattr(os, name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _name(self, path: object) -> str:
        return os.path.relpath(str(path), self.root)

    def _of(self, fd: int) -> str:
        return self._name(os.readlink(f"/proc/self/fd/{fd}"))

    def _write(self, fd: int, data: Any) -> int:
        count: int = self._real["write"](fd, data)
        self.done.append(("write", self._of(fd), bytes(memoryview(data).cast("B")[:count])))
        return count

    def _fsync(self, fd: int) -> None:
        self._real["fsync"](fd)
        self.done.append(("sync", self._of(fd)))

    def _replace(self, source: Any, target: Any) -> None:
        self._real["replace"](source, target)
        self.done.append(("rename", self._name(source), self._name(target)))

    def _mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._real["mkdir"](path, *args, **kwargs)
        self.done.append(("mkdir", self._name(path)))

    def _unlink(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._real["unlink"](path, *args, **kwargs)
        self.done.append(("unlink", self._name(path)))

    def _rmdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._real["rmdir"](path, *args, **kwargs)
        self.done.append(("unlink", self._name(path)))


@dataclass
class File:
    synced: bytes = b""
    written: bytes = b""

    def may_be(self) -> list[bytes]:
        """Nothing kept first, everything last; so for a directory."""
        if self.synced == self.written:
            return [self.written]
        half = self.written[: len(self.written) // 2]
        return [self.synced, half, bytes(len(self.written)), self.written]


@dataclass
class Directory:
    synced: dict[str, File | Directory] = field(default_factory=dict)
    #: Changes since then; each sets some names, to None where a name goes.
    pending: list[dict[str, File | Directory | None]] = field(default_factory=list)

    def after(self, changes: list[dict[str, File | Directory | None]]) -> dict[str, File | Directory]:
        entries: dict[str, File | Directory | None] = {**self.synced}
        for change in changes:
            entries.update(change)
        return {name: node for name, node in entries.items() if node is not None}

    def may_be(self) -> list[dict[str, File | Directory]]:
        return [self.after(changes) for changes in _subsets(self.pending)]


def _subsets(changes: list[Any]) -> list[list[Any]]:
    count = len(changes)
    if count <= 3:
        return [list(part) for size in range(count + 1) for part in combinations(changes, size)]
    singles = [[change] for change in changes[1:]]
    all_but_one = [changes[:index] + changes[index + 1 :] for index in range(count - 1)]
    return [[], *singles, *all_but_one, *(changes[:end] for end in range(1, count + 1))]


class Disk:
    """A directory tree of which only what was synced is sure."""

    def __init__(self) -> None:
        self.root = Directory()

    def apply(self, effect: Effect) -> None:
        verb, path = effect[0], effect[1]
        if verb == "sync":
            node = self._find(path)
            if isinstance(node, File):
                node.synced = node.written
            else:
                node.synced, node.pending = node.after(node.pending), []
            return
        folder, name = self._directory(path)
        here = folder.after(folder.pending).get(name)
        if verb == "write":
            if here is None:
                here = File()
                folder.pending.append({name: here})
            assert isinstance(here, File)
            here.written += effect[2]
        elif verb == "mkdir":
            folder.pending.append({name: Directory()})
        elif verb == "unlink":
            folder.pending.append({name: None})
        else:
            target, new_name = self._directory(effect[2])
            assert verb == "rename"
            assert target is folder
            folder.pending.append({name: None, new_name: here})

    def states(self) -> Iterator[Tree]:
        """Every state that a crash now may leave, within the bounds; some more than once."""
        choices = {id(node): node.may_be() for node in _reachable(self.root)}
        open_ = [key for key, found in choices.items() if len(found) > 1]
        if len(open_) <= 3:
            rest = {key: found[-1] for key, found in choices.items()}
            for chosen in product(*(choices[key] for key in open_)):
                yield _tree(self.root, "", rest | dict(zip(open_, chosen, strict=True)))
            return
        for others in (0, -1):
            rest = {key: found[others] for key, found in choices.items()}
            for key in open_:
                for found in choices[key]:
                    yield _tree(self.root, "", rest | {key: found})

    def now(self) -> Tree:
        """What a reader sees who asks before any crash."""
        return _tree(self.root, "", {id(node): node.may_be()[-1] for node in _reachable(self.root)})

    def _find(self, path: str) -> File | Directory:
        node: File | Directory = self.root
        for part in Path(path).parts:
            assert isinstance(node, Directory)
            node = node.after(node.pending)[part]
        return node

    def _directory(self, path: str) -> tuple[Directory, str]:
        folder = self._find(str(Path(path).parent))
        assert isinstance(folder, Directory)
        return folder, Path(path).name


def _reachable(node: File | Directory) -> Iterator[File | Directory]:
    """The node and all that it holds, held, or may hold."""
    yield node
    if isinstance(node, Directory):
        names = [*node.synced.values(), *(inner for change in node.pending for inner in change.values())]
        for inner in {id(inner): inner for inner in names if inner is not None}.values():
            yield from _reachable(inner)


def _tree(folder: Directory, prefix: str, chosen: dict[int, Any]) -> Tree:
    tree: Tree = {}
    for name, node in chosen[id(folder)].items():
        path = f"{prefix}{name}"
        tree[path] = chosen[id(node)] if isinstance(node, File) else None
        if isinstance(node, Directory):
            tree |= _tree(node, f"{path}/", chosen)
    return tree


def materialise(tree: Tree, root: Path) -> None:
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def tree_of(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }
