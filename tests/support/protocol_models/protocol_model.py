"""The checkpoint protocol as a small model, and a search through every order in which its operations can happen.

A world is what lies in the storage and where each attempt stands. Each transition is one storage operation of one
attempt, the start of another attempt, or damage to one checkpoint. An attempt that pauses for ever is the same as one
that crashed, so neither needs a transition: in every world, each attempt may have done its last operation. A reader
looks at every world. What is left out: the journal (so a manifest that vanished is no damage here; the journal is what
tells the two apart), several ranks (rank 0 writes the manifest when all are durable), and stale listings (an attempt
waits them out between its claim and its second look).

`Rules` names what the protocol insists on; `explore` finds the shortest way to harm when one rule is taken away.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

Key = int  #: an attempt's place in the total order of claims: _NUMBER times its number, plus its nonce
Ref = tuple[int, Key]  #: step, attempt; they sort as in the product
Label = tuple[Key, str, Ref | Key | None]  #: who, what, to which checkpoint or attempt
_NUMBER = 64
_ENDED = ("over", "refused", "misled")


@dataclass(frozen=True)
class Rules:
    """The protocol; each field that is changed makes a variant of it."""

    claim_before_reading: bool = True
    look_again: bool = True  #: after the claim
    total_order: bool = True  #: of claims; else only a higher number supersedes
    list_before_acknowledging: bool = True
    verify: bool = True  #: every byte that is loaded
    manifest_written_last: bool = True
    manifest_deleted_first: bool = True
    keep: int = 2
    commits_before_deleting: int = 2  #: acknowledged ones of its own
    lineage_counts: bool = True  #: when the newest `keep` are chosen; else only an attempt's own commits do
    lineage_read: bool = True  #: by readers and resumers
    sweep: str = "lower"  #: strays of "lower" attempts are deleted, of "all", or of "none"
    owner: str = (
        "highest committed"  #: whose lineage counts; or "highest claimed"; or "nobody": the highest steps count
    )
    refuse: bool = True  #: to go on when commits exist and none is whole; else start from zero

    @cached_property
    def order(self) -> tuple[str, str]:
        """The operations of a save, but for the acknowledgement."""
        return ("files", "manifest") if self.manifest_written_last else ("manifest", "files")


class Stored(NamedTuple):
    """One checkpoint's directory."""

    ref: Ref
    lineage: tuple[Ref, ...] | None  #: what its manifest names; None without a manifest
    files: bool
    bad: str  #: the part that damage struck


class Attempt(NamedTuple):
    """One attempt and its next operation."""

    key: Key
    next: str
    todo: tuple[Key, ...] = ()  #: lower attempts that are still to be read
    refs: tuple[Ref, ...] = ()  #: manifests still to be read, or checkpoints still to be deleted
    found: tuple[Ref, ...] = ()  #: candidates
    inherited: tuple[Ref, ...] = ()  #: the lineage that the first manifest found names
    rejected: bool = False  #: something damaged was seen
    base: Ref | None = None
    step: int = 0
    lineage: tuple[Ref, ...] = ()
    commits: tuple[Ref, ...] = ()
    num_acked: int = 0
    swept: bool = False
    origin: Key = 0  #: of a generation in memory: the attempt with which its group resumed from the storage
    generation: int = 0


class World(NamedTuple):
    """What lies in the storage, where the attempts stand, and what the user was told."""

    attempts: tuple[Attempt, ...] = ()
    claims: tuple[Key, ...] = ()
    disk: tuple[Stored, ...] = ()
    acked: Ref | None = None  #: the last acknowledged commit
    before: Ref | None = None  #: the one acknowledged before it that damage had not struck by then
    damaged: Ref | None = None


@dataclass(frozen=True)
class Bounds:
    """How large a world may grow."""

    attempts: int = 2
    saves: int = 3  #: by each attempt
    damage: bool = True


# -- the storage -------------------------------------------------------------------------------------------------------


def at(world: World, ref: Ref) -> Stored | None:
    for item in world.disk:
        if item.ref == ref:
            return item
    return None


def readable(item: Stored | None) -> bool:
    """Its manifest is there and valid."""
    return item is not None and item.lineage is not None and item.bad != "manifest"


def whole(item: Stored | None) -> bool:
    return item is not None and item.lineage is not None and item.files and not item.bad


def put(world: World, new: Stored) -> World:
    rest = [item for item in world.disk if item.ref != new.ref]
    kept = [new] if new.files or new.lineage is not None else []
    return world._replace(disk=tuple(sorted(rest + kept, key=lambda item: item.ref)))


def is_superseded(world: World, key: Key, rules: Rules) -> bool:
    highest = world.claims[-1]
    return highest > key if rules.total_order else highest // _NUMBER > key // _NUMBER


def accepted(world: World, rules: Rules) -> list[Ref]:
    """What a reader counts as the run's checkpoints, newest first."""
    valid = [item for item in world.disk if readable(item)]
    if not valid:
        return []
    if rules.owner == "nobody":
        return [item.ref for item in reversed(valid)]
    owner = world.claims[-1] if rules.owner == "highest claimed" else max(item.ref[1] for item in valid)
    own = [item for item in valid if item.ref[1] == owner]
    lineage = own[-1].lineage if own and rules.lineage_read else ()
    return [item.ref for item in reversed(own)] + [ref for ref in lineage or () if readable(at(world, ref))]


# -- one operation of one attempt --------------------------------------------------------------------------------------

Step = tuple[str, Ref | Key | None, Attempt, World]  #: what, to which, the attempt and the world after it


def operate(me: Attempt, world: World, rules: Rules, saves: int) -> Step | None:
    """The attempt's next operation, or None when it has nothing more to do."""
    match me.next:
        case "claim":
            claimed = world._replace(claims=tuple(sorted([*world.claims, me.key])))
            return "put claim", me.key, me._replace(next="look"), claimed
        case "look" | "lower":
            return "list claims", None, look(me, world, rules), world
        case "list":
            refs = tuple(item.ref for item in reversed(world.disk) if item.ref[1] == me.todo[0])
            after = me._replace(next="read", todo=me.todo[1:], refs=refs)
            return "list attempt", me.todo[0], after if refs else go_down(after, rules), world
        case "read" | "inherit":
            return "read manifest", me.refs[0], read(me, at(world, me.refs[0]), rules), world
        case "load":
            return "load", me.found[0], load(me, at(world, me.found[0]), rules), world
        case "refuse":
            over = is_superseded(world, me.key, rules)
            return "list claims", None, ended(me, "over" if over else "refused"), world
        case "unmanifest" | "unfile":
            return delete(me, world, rules)
        case "strays":
            return "list strays", None, sweep(me, world, rules), world
    return save(me, world, rules, saves)


def look(me: Attempt, world: World, rules: Rules) -> Attempt:
    """One listing after the claim: who is above me, and the lower attempts that I go on from."""
    if me.next == "look":
        if rules.look_again and is_superseded(world, me.key, rules):
            return ended(me)
        if not rules.claim_before_reading:
            return me._replace(next=rules.order[0])
    return go_down(me._replace(todo=tuple(key for key in reversed(world.claims) if key < me.key)), rules)


def ended(me: Attempt, how: str = "over") -> Attempt:
    """All that matters of it from now on is what it stood on."""
    return Attempt(me.key, how, base=me.base, origin=me.origin, generation=me.generation)


def go_down(me: Attempt, rules: Rules) -> Attempt:
    """To the next lower attempt; at the bottom, or when the owner is found, to the candidates."""
    if me.todo and (rules.owner == "nobody" or not me.found):
        return me._replace(next="list")
    if me.found:
        found = tuple(sorted(me.found, reverse=True)) if rules.owner == "nobody" else me.found
        return me._replace(next="load", found=found, todo=())
    return me._replace(next="refuse") if me.rejected and rules.refuse else begin(me, None, rules)


def begin(me: Attempt, base: Ref | None, rules: Rules) -> Attempt:
    first = rules.order[0] if rules.claim_before_reading else "claim"
    return Attempt(me.key, first, base=base, step=base[0] if base else 0, lineage=me.found)


def read(me: Attempt, item: Stored | None, rules: Rules) -> Attempt:
    ref, left = me.refs[0], me.refs[1:]
    rejected = me.rejected or (item is not None and item.bad == "manifest" and item.lineage is not None)
    me = me._replace(refs=left, rejected=rejected)
    if readable(item):
        if not me.found and rules.lineage_read and rules.owner != "nobody":
            assert item is not None
            assert item.lineage is not None
            me = me._replace(inherited=item.lineage)
        me = me._replace(found=(*me.found, ref))
    if left:
        return me
    if me.inherited:
        return me._replace(next="inherit", refs=me.inherited, inherited=(), todo=())
    return go_down(me._replace(todo=() if rules.owner == "highest claimed" else me.todo), rules)


def load(me: Attempt, item: Stored | None, rules: Rules) -> Attempt:
    if whole(item):
        return begin(me, me.found[0], rules)
    if not rules.verify:
        return ended(me, "misled")
    me = me._replace(found=me.found[1:], rejected=True)
    return me if me.found else go_down(me, rules)


def save(me: Attempt, world: World, rules: Rules, saves: int) -> Step | None:
    first, second = rules.order
    if me.next == first:
        if me.step == saves + (me.base[0] if me.base else 0):
            return None
        me = me._replace(step=me.step + 1)
    mine = (me.step, me.key)
    if me.next == "ack":
        if rules.list_before_acknowledging and is_superseded(world, me.key, rules):
            return "list claims", None, ended(me), world
        told = world._replace(acked=mine, before=world.before if world.acked == world.damaged else world.acked)
        me = me._replace(commits=(*me.commits, mine), num_acked=me.num_acked + 1)
        return "list claims", None, retain(me, rules), told
    here = at(world, mine) or Stored(mine, None, False, "")
    here = here._replace(files=True) if me.next == "files" else here._replace(lineage=me.lineage)
    after = me._replace(next=second if me.next == first else "ack")
    return f"put {me.next}", mine, after, put(world, here)


def retain(me: Attempt, rules: Rules) -> Attempt:
    if me.num_acked < rules.commits_before_deleting:
        return me._replace(next=rules.order[0])
    counted = sorted([*me.commits, *(me.lineage if rules.lineage_counts else ())], reverse=True)
    kept = counted[: rules.keep]
    commits = tuple(ref for ref in me.commits if ref in kept)
    lineage = tuple(ref for ref in me.lineage if ref in kept)
    doomed = tuple(ref for ref in (*me.commits, *me.lineage) if ref not in kept)
    return go_on_deleting(me._replace(commits=commits, lineage=lineage, refs=doomed), rules)


def go_on_deleting(me: Attempt, rules: Rules) -> Attempt:
    if me.refs:
        return me._replace(next="unmanifest" if rules.manifest_deleted_first else "unfile")
    return me._replace(next=rules.order[0] if me.swept or rules.sweep == "none" else "strays")


def delete(me: Attempt, world: World, rules: Rules) -> Step:
    ref, what = me.refs[0], "manifest" if me.next == "unmanifest" else "files"
    if (me.next == "unmanifest") == rules.manifest_deleted_first:
        after = me._replace(next="unfile" if me.next == "unmanifest" else "unmanifest")
    else:
        after = go_on_deleting(me._replace(refs=me.refs[1:]), rules)
    here = at(world, ref) or Stored(ref, None, False, "")
    here = here._replace(lineage=None) if me.next == "unmanifest" else here._replace(files=False)
    return f"delete {what}", ref, after, put(world, here)


def sweep(me: Attempt, world: World, rules: Rules) -> Attempt:
    """Lists what lies outside the lineage: torn, disowned or rejected."""
    others = [
        item.ref for item in world.disk if item.ref[1] < me.key or (rules.sweep == "all" and item.ref[1] > me.key)
    ]
    return go_on_deleting(me._replace(refs=tuple(ref for ref in others if ref not in me.lineage), swept=True), rules)


# -- what must hold in every world -------------------------------------------------------------------------------------


def problem(world: World, rules: Rules) -> str:
    """What is wrong with this world, or nothing."""
    seen = accepted(world, rules)
    items = [at(world, ref) for ref in seen]
    if not world.damaged and any(item is None or not item.files for item in items):
        return "a checkpoint counts whose files are not there"
    newest = next((ref for ref, item in zip(seen, items, strict=True) if whole(item)), None)
    bases = {me.key: me.base for me in world.attempts}
    safe = world.before if world.acked == world.damaged else world.acked  # damage costs what it struck, and no more
    if not stands_on(newest, safe, bases):
        return f"{show(safe)} was acknowledged, and a reader finds {show(newest)}"
    if not stands_on(world.acked, world.before, bases):
        return f"{show(world.acked)} was acknowledged, and does not stand on {show(world.before)}"
    if not world.damaged:
        highest = max((ref[1] for ref in seen), default=0)
        committed = max((item.ref[1] for item in world.disk if item.lineage is not None), default=0)
        if newest and not stands_on((newest[0], max(highest, committed)), newest, bases):
            return f"{show(newest)} of a superseded attempt counts"
    for me in world.attempts:
        if wrong := _wrong(me, world, safe, bases, rules):
            return wrong
    return _litter(world, seen, rules)


def _wrong(me: Attempt, world: World, safe: Ref | None, bases: dict[Key, Ref | None], rules: Rules) -> str:
    if me.next == "misled":
        return "an attempt loaded what was never committed"
    if not world.claims or world.claims[-1] != me.key:
        return ""
    if me.next == "refused" and (safe or not world.damaged):
        return f"an attempt found nothing whole, though {show(safe)} was acknowledged"
    if me.next == rules.order[0] and not me.num_acked and me.step == (me.base[0] if me.base else 0):
        if not stands_on(me.base, safe, bases):
            return f"{show(safe)} was acknowledged, and the next attempt goes on from {show(me.base)}"
        if world.acked and not me.base:
            return "commits exist, and an attempt starts from zero"
    return ""


def _litter(world: World, seen: list[Ref], rules: Rules) -> str:
    for me in world.attempts:
        if sum(item.ref[1] == me.key for item in world.disk) > rules.keep + 1:
            return "an attempt has more checkpoints than it keeps, and one that it writes"
        if me.num_acked > 2 and me.next == rules.order[0] and world.claims[-1] == me.key:
            for lower in world.claims[:-1]:
                if sum(item.ref[1] == lower and item.ref not in seen for item in world.disk) > 1:
                    return "a lower attempt's strays stay, and more than one a zombie"
    return ""


def stands_on(ref: Ref | None, older: Ref | None, bases: dict[Key, Ref | None]) -> bool:
    """`ref` is `older` or came out of training on from it."""
    if older is None:
        return True
    while ref is not None:
        if ref[1] == older[1] and ref[0] >= older[0]:
            return True
        ref = bases[ref[1]]
    return False


Operate = Callable[[Attempt, World, Rules, int], Step | None]

# -- every world -------------------------------------------------------------------------------------------------------


def successors(world: World, rules: Rules, bounds: Bounds, operate: Operate = operate) -> Iterator[tuple[Label, World]]:
    for index, me in enumerate(world.attempts):
        step = operate(me, world, rules, bounds.saves) if me.next not in _ENDED else None
        if step is not None:
            what, target, after, changed = step
            attempts = (*world.attempts[:index], after, *world.attempts[index + 1 :])
            yield (me.key, what, target), changed._replace(attempts=attempts)
    if len(world.attempts) < bounds.attempts:
        for key in free_keys(world, (world.claims[-1] if world.claims else 0) // _NUMBER + 1):
            new = Attempt(key, "claim" if rules.claim_before_reading else "lower")
            attempts = tuple(sorted([*world.attempts, new], key=lambda me: me.key))
            yield (key, "list claims", None), world._replace(attempts=attempts)
    if bounds.damage and not world.damaged:
        for item in world.disk:
            if item.lineage is not None:
                for part in ("manifest", "files"):
                    struck = put(world, item._replace(bad=part))._replace(damaged=item.ref)
                    yield (0, f"damage to the {part}", item.ref), struck


def free_keys(world: World, number: int) -> list[Key]:
    """The keys of a number, one for each place among those that race for it."""
    racing = [me.key for me in world.attempts if me.key // _NUMBER == number]
    edges = [number * _NUMBER, *racing, (number + 1) * _NUMBER]
    return [(low + high) // 2 for low, high in pairwise(edges)]


@dataclass(frozen=True)
class Explored:
    """What the search found: how many different worlds, and the shortest way to a problem, if there is one."""

    num_worlds: int
    depth: int
    problem: str = ""
    trail: tuple[Label, ...] = ()

    def __str__(self) -> str:
        lines = [f"{number:3}. {_told(label)}" for number, label in enumerate(self.trail, 1)]
        return "\n".join([f"{self.problem or 'holds'} ({self.num_worlds:,} worlds, depth {self.depth})", *lines])


Successors = Callable[[World, Rules, Bounds], Iterator[tuple[Label, World]]]
Problem = Callable[[World, Rules], str]


def explore(rules: Rules, bounds: Bounds, successors: Successors = successors, problem: Problem = problem) -> Explored:
    """Breadth first, so that a problem comes with the fewest operations. Worlds seen are remembered by 64-bit hash."""
    gc.disable()  # millions of tuples and no cycle among them: looking for one takes most of the time
    try:
        return _explore(rules, bounds, successors, problem)
    finally:
        gc.enable()


def _explore(rules: Rules, bounds: Bounds, successors: Successors, problem: Problem) -> Explored:
    start = World()
    seen = {hash(start)}
    frontier: list[tuple[World, tuple | None]] = [(start, None)]  # type: ignore[type-arg]
    depth = 0
    while frontier:
        reached: list[tuple[World, tuple | None]] = []  # type: ignore[type-arg]
        for world, trail in frontier:
            for label, after in successors(world, rules, bounds):
                code = hash(after)
                if code in seen:
                    continue
                seen.add(code)
                link = (label, trail)
                if wrong := problem(after, rules):
                    return Explored(len(seen), depth + 1, wrong, tuple(_unlink(link)))
                reached.append((after, link))
        frontier, depth = reached, depth + bool(reached)
    return Explored(len(seen), depth)


def advance(world: World, key: Key, saves: int) -> tuple[list[tuple[str, Ref | Key | None]], World]:
    """What one attempt does, undisturbed, until it has begun that many saves or ended; a new one starts."""
    others = tuple(me for me in world.attempts if me.key != key)
    me = next((me for me in world.attempts if me.key == key), None)
    done: list[tuple[str, Ref | Key | None]] = [] if me else [("list claims", None)]
    me = me or Attempt(key, "claim")
    while me.next not in _ENDED and (step := operate(me, world, Rules(), saves)) is not None:
        what, target, me, world = step
        done.append((what, target))
    return done, world._replace(attempts=tuple(sorted([*others, me], key=lambda me: me.key)))


def _unlink(link: tuple | None) -> list[Label]:  # type: ignore[type-arg]
    labels = []
    while link is not None:
        label, link = link
        labels.append(label)
    return labels[::-1]


def numbered(number: int) -> Key:
    """The key of an attempt that raced with nobody for its number."""
    return number * _NUMBER + _NUMBER // 2


def number_of(key: Key) -> int:
    return key // _NUMBER


def attempt_name(key: Key) -> str:
    """Such as `2` or, where attempts raced for a number, `2.48` (the nonce tells who is higher)."""
    number, nonce = divmod(key, _NUMBER)
    return f"{number}" if nonce == _NUMBER // 2 else f"{number}.{nonce}"


def show(ref: Ref | None) -> str:
    return f"step {ref[0]} of attempt {attempt_name(ref[1])}" if ref else "nothing"


def _told(label: Label) -> str:
    key, what, target = label
    who = f"attempt {attempt_name(key)}: " if key else ""
    to = f" {show(target)}" if isinstance(target, tuple) else f" {attempt_name(target)}" if target else ""
    return f"{who}{what}{to}"
