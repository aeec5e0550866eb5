"""The roster: which processes form the training group, by generation. Pure state; somebody else carries it out.

A generation is one assignment of processes to ranks. When a process of it is lost, the next generation follows: a spare
takes the lost rank or, if the world may shrink, the others move up. Whoever holds a seat in the newest generation
continues; all others must not. A generation begins once each of its members has left the one before it (`arrive`), so
nobody connects to a process that is lost already.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: Generations in a row without a step after which going on in memory is given up: the loss has a cause that remains.
MAX_WITHOUT_STEP = 10
#: Processes that raise an error, without a step between them, after which it is given up: the next ones would, too.
MAX_RAISED = 1


class RosterState(Enum):
    """What the group is at."""

    GATHERING = "gathering"  #: waits for processes
    FORMING = "forming"  #: a generation is announced, and not all of its members have left the one before it
    RUNNING = "running"
    GIVEN_UP = "given up"
    DONE = "done"  #: a member has ended as it should, so the others are about to


@dataclass(frozen=True, slots=True)
class Generation:
    """One assignment of processes to ranks.

    Attributes:
        number: Counted from 0; a higher one replaces all lower ones.
        members: Names of the processes, by rank.
        lost: Members of the generation before it that were lost.
    """

    number: int
    members: tuple[str, ...]
    lost: tuple[str, ...] = ()


class Roster:
    """The processes of one attempt in memory, and their newest generation.

    Args:
        size: World size.
        is_elastic: Whether the group may go on with fewer processes.
        min_size: The fewest with which it goes on.
        max_size: The most to which it grows; by default, `size`.

    Attributes:
        state: What the group is at.
        newest: The newest generation; None before the first.
        spares: Processes without a rank, in the order in which they joined.
    """

    def __init__(self, size: int, *, is_elastic: bool = False, min_size: int = 1, max_size: int | None = None) -> None:
        self._size, self._is_elastic, self._min_size, self._max_size = size, is_elastic, min_size, max_size or size
        self.state = RosterState.GATHERING
        self.newest: Generation | None = None
        self.spares: list[str] = []
        self._first: dict[int, str] = {}
        self._alive: set[str] = set()
        self._joined: set[str] = set()
        self._arrived: set[str] = set()
        self._newest_step = -1
        self._num_without_step = self._num_raised = 0

    @property
    def lost(self) -> tuple[str, ...]:
        """Members of the newest generation that are lost."""
        return tuple(name for name in self.newest.members if name not in self._alive) if self.newest else ()

    @property
    def raises_again(self) -> bool:
        """Whether an error comes back without a step between, so that the next processes would raise it, too."""
        return self._num_raised > MAX_RAISED

    def join(self, name: str, rank: int | None = None) -> None:
        """Add a process: one of the first generation with its rank, or a spare."""
        self._alive.add(name)
        self._joined.add(name)
        if rank is None or self.newest is not None:
            self.spares.append(name)
        else:
            self._first[rank] = name

    def lose(self, name: str, *, has_raised: bool = False) -> None:
        """Remove a process that died, is silent, left, or has raised an error."""
        self._num_raised += has_raised
        self._alive.discard(name)
        self._arrived.discard(name)
        self.spares = [spare for spare in self.spares if spare != name]

    def arrive(self, name: str, number: int) -> None:
        """Record that a member is ready to connect to the others of generation `number`."""
        if self.newest is not None and number == self.newest.number and name in self._alive:
            self._arrived.add(name)
            if self.state is RosterState.FORMING and self._arrived == set(self.newest.members):
                self.state = RosterState.RUNNING

    def has_joined(self, name: str) -> bool:
        """Return whether a process has ever joined."""
        return name in self._joined

    def finish(self) -> None:
        """Record that training has ended: from now on processes leave without being replaced."""
        self.state = RosterState.DONE

    def give_up(self) -> None:
        """Record that going on in memory is no help."""
        self.state = RosterState.GIVEN_UP

    def step(self, step: int) -> None:
        """Record that a process has done `step` steps."""
        if step > self._newest_step:
            self._newest_step, self._num_without_step, self._num_raised = step, 0, 0

    def advance(self) -> Generation | None:
        """Return the next generation if one is due; call it after each change."""
        if self.state in (RosterState.GIVEN_UP, RosterState.DONE):
            return None
        members = () if self.raises_again else self._next_members()
        if members is None:
            return None
        self._num_without_step += 1
        if not members or self._num_without_step > MAX_WITHOUT_STEP:
            self.state = RosterState.GIVEN_UP
            return None
        lost = self.lost
        self.newest = Generation(0 if self.newest is None else self.newest.number + 1, members, lost)
        self.spares = [spare for spare in self.spares if spare not in members]
        self._arrived.clear()
        self.state = RosterState.FORMING
        return self.newest

    def _next_members(self) -> tuple[str, ...] | None:
        """Return the members of the next generation; None if none is due, or it lacks processes."""
        if self.newest is None:
            is_complete = self._first.keys() == set(range(self._size)) and self._alive >= set(self._first.values())
            return tuple(self._first[rank] for rank in range(self._size)) if is_complete else None
        before = self.newest.members
        may_grow = self._is_elastic and len(before) < self._max_size and bool(self.spares)
        if not self.lost and not may_grow:
            return None
        spares = iter(self.spares)
        seats = [name if name in self._alive else next(spares, None) for name in before]
        if self._is_elastic:
            seats = [name for name in seats if name is not None]
            seats += [name for name, _ in zip(spares, range(self._max_size - len(seats)), strict=False)]
        members = tuple(name for name in seats if name is not None)
        if len(members) == len(seats) and len(members) >= self._min_size:
            return members
        self.state = RosterState.GATHERING
        return None
