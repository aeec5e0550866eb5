"""The protocol model with generations that go on in memory, beside attempts that resume from the storage.

A generation begins with the state of the newest one of its group, and with no operation: its steps need none. It then
lists the claims, puts its own, lists and reads once more, and may commit from then on. Whatever the older generation
had begun it may go on with at any moment: its members were only cut off, or stopped and woken. An attempt that resumes
from the storage is another launch, or a restart of the whole group; either trains on to other content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.protocol_models.protocol_model import (
    Attempt,
    Bounds,
    Explored,
    Key,
    Label,
    Ref,
    Rules,
    Step,
    World,
    at,
    attempt_name,
    ended,
    explore,
    free_keys,
    number_of,
    operate,
    problem,
    readable,
    successors,
)


@dataclass(frozen=True)
class MemoryRules(Rules):
    """What the protocol insists on for generations in memory; each field that is changed makes a variant of it."""

    claims_before_commit: bool = True
    lists_before_claim: bool = True
    reads_after_claim: bool = True  #: the checkpoints that count; else before it
    others_end_it: bool = True  #: a claim of others since its group resumed, seen after its own claim
    newer_commit_ends_it: bool = True
    number_by_generation: bool = True  #: else one more than the highest claim that it has listed
    restarts: bool = True  #: attempts that resume from the storage begin at any time; else only the first one


def explore_generations(rules: MemoryRules, bounds: Bounds) -> Explored:
    return explore(rules, bounds, memory_successors, memory_problem)


def memory_problem(world: World, rules: Rules) -> str:
    """As `problem`; and no generation is above a later one of its group, which would end for it."""
    claimed = [me for me in world.attempts if me.key in world.claims and me.generation]
    for me in claimed:
        for other in claimed:
            if other.origin == me.origin and other.generation < me.generation and other.key > me.key:
                return f"generation {other.generation} has superseded a later one, {attempt_name(me.key)}"
    return problem(world, rules)


def memory_successors(world: World, rules: Rules, bounds: Bounds) -> Iterator[tuple[Label, World]]:
    assert isinstance(rules, MemoryRules)
    for label, after in successors(world, rules, bounds, _operate):
        if rules.restarts or not world.attempts or len(after.attempts) == len(world.attempts):
            yield label, after
    if len(world.attempts) < bounds.attempts:
        yield from _regroup(world, rules)


def _operate(me: Attempt, world: World, rules: Rules, saves: int) -> Step | None:
    assert isinstance(rules, MemoryRules)
    return _claim(me, world, rules) if _is_claiming(me) else operate(me, world, rules, saves)


def _is_claiming(me: Attempt) -> bool:
    return bool(me.generation) and me.next in ("before", "put", "check", "below", "manifests")


def _regroup(world: World, rules: MemoryRules) -> Iterator[tuple[Label, World]]:
    """The newest generation of a group ends, and the next one begins with its state."""
    for me in world.attempts:
        origin, generation = me.origin or me.key, me.generation + 1
        is_newest = all(generation > other.generation for other in world.attempts if other.origin == origin)
        has_state = _is_claiming(me) or me.next in ("files", "manifest", "ack", "unmanifest", "unfile", "strays")
        if not (is_newest and has_state):
            continue
        base: Ref | None = (me.step, me.key) if me.step else None
        number = number_of(origin) + generation
        if not rules.number_by_generation:
            number = number_of(world.claims[-1]) + 1
        for key in free_keys(world, number):
            first = "before" if rules.claims_before_commit else rules.order[0]
            new = Attempt(key, first, base=base, step=me.step, origin=origin, generation=generation)
            attempts = tuple(sorted([*world.attempts, new], key=lambda me: me.key))
            yield (me.key, "lost a member; goes on as", key), world._replace(attempts=attempts)


def _claim(me: Attempt, world: World, rules: MemoryRules) -> Step:
    """The next operation of a generation that has not claimed the run yet, or not read what counts."""
    lower = tuple(key for key in reversed(world.claims) if key < me.key)
    match me.next:
        case "before":
            if rules.lists_before_claim and _others(me, world):
                return "list claims", None, ended(me), world
            after = me._replace(next="put") if rules.reads_after_claim else _look_down(me._replace(todo=lower), rules)
            return "list claims", None, after, world
        case "put":
            claimed = world._replace(claims=tuple(sorted([*world.claims, me.key])))
            after = me._replace(next="check") if rules.reads_after_claim else _begin(me, rules)
            return "put claim", me.key, after, claimed
        case "check":
            if (rules.others_end_it and _others(me, world)) or world.claims[-1] > me.key:
                return "list claims", None, ended(me), world
            return "list claims", None, _look_down(me._replace(todo=lower), rules), world
        case "below":
            refs = tuple(item.ref for item in reversed(world.disk) if item.ref[1] == me.todo[0])
            after = me._replace(next="manifests", todo=me.todo[1:], refs=refs)
            return "list attempt", me.todo[0], after if refs else _look_down(after, rules), world
        case "manifests":
            return "read manifest", me.refs[0], _read(me, world, rules), world
    raise AssertionError(me.next)


def _read(me: Attempt, world: World, rules: MemoryRules) -> Attempt:
    """Read one manifest: of the highest lower attempt that has any, then of the lineage that its newest one names."""
    item, found = at(world, me.refs[0]), me
    if readable(item):
        assert item is not None
        assert item.lineage is not None
        inherited = item.lineage if not me.found else me.inherited
        found = me._replace(found=(*me.found, me.refs[0]), inherited=inherited)
    elif item is not None and item.lineage is not None and item.ref[0] > me.step and item.ref[1] >= me.origin:
        found = me._replace(rejected=True)  # damaged, and newer than what is in memory
    found = found._replace(refs=me.refs[1:])
    if found.refs:
        return found
    if found.inherited:
        return found._replace(refs=found.inherited, inherited=(), todo=())
    return _look_down(found, rules)


def _look_down(me: Attempt, rules: MemoryRules) -> Attempt:
    """To the next lower attempt until one has commits; then decide."""
    if me.todo and not me.found:
        return me._replace(next="below")
    newest = me.found[0] if me.found else None
    if rules.newer_commit_ends_it and (me.rejected or (newest is not None and newest[0] > me.step)):
        return ended(me)
    return _begin(me, rules) if rules.reads_after_claim else me._replace(next="put", lineage=me.found)


def _begin(me: Attempt, rules: MemoryRules) -> Attempt:
    lineage = me.found if rules.reads_after_claim else me.lineage
    return Attempt(
        me.key,
        rules.order[0],
        base=me.base,
        step=me.step,
        lineage=lineage,
        origin=me.origin,
        generation=me.generation,
    )


def _others(me: Attempt, world: World) -> bool:
    """Somebody else has claimed since the group resumed from the storage, or a later generation of it has."""
    by_key: dict[Key, Attempt] = {other.key: other for other in world.attempts}
    return any(
        by_key[key].origin != me.origin or key > me.key for key in world.claims if key > me.origin and key != me.key
    )


def go_on(
    world: World, before: Key, key: Key, step: int, saves: int
) -> tuple[list[tuple[str, Ref | Key | None]], World]:
    """What a generation does that goes on after `step` steps of `before`, until it has saved that often."""
    others = tuple(me for me in world.attempts if me.key != key)
    new = Attempt(key, "before", base=(step, before), step=step, origin=before, generation=1)
    me = next((me for me in world.attempts if me.key == key), new)
    done: list[tuple[str, Ref | Key | None]] = []
    world = world._replace(attempts=tuple(sorted([*others, me], key=lambda me: me.key)))
    while me.next != "over" and (operation := _operate(me, world, MemoryRules(), saves)) is not None:
        what, target, me, world = operation
        done.append((what, target))
    return done, world._replace(attempts=tuple(sorted([*others, me], key=lambda me: me.key)))
