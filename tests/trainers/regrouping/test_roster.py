"""The roster as tables: who sits where in the next generation, and when there is none."""

from __future__ import annotations

import pytest

from outlast.trainers.regrouping.roster import MAX_WITHOUT_STEP, Generation, Roster, RosterState


def roster(size: int, spares: str = "", *, is_elastic: bool = False, min_size: int = 1) -> Roster:
    """A running group of the processes a, b, c, …, and spares."""
    made = Roster(size, is_elastic=is_elastic, min_size=min_size)
    for rank in reversed(range(size)):
        made.join("abcdefgh"[rank], rank)
    assert made.advance() == Generation(0, tuple("abcdefgh"[:size]))
    for spare in spares:
        made.join(spare)
        assert made.advance() is None
    arrive_all(made)
    return made


def arrive_all(made: Roster) -> None:
    assert made.newest is not None
    for name in made.newest.members:
        assert made.state is RosterState.FORMING
        made.arrive(name, made.newest.number)
    assert made.state is RosterState.RUNNING


@pytest.mark.parametrize(
    ("spares", "is_elastic", "lost", "members"),
    [
        ("xy", False, "a", "xbc"),
        ("xy", False, "c", "abx"),
        ("xy", False, "ac", "xby"),
        ("x", False, "ac", None),
        ("", False, "b", None),
        ("x", False, "x", None),
        ("", True, "b", "ac"),
        ("", True, "ab", "c"),
        ("", True, "abc", None),
        ("x", True, "b", "axc"),
        ("x", True, "ab", "xc"),
    ],
)
def test_the_next_generation(spares: str, is_elastic: bool, lost: str, members: str | None) -> None:
    """All are lost before the roster decides. A spare takes the lost rank; without one the others move up, or wait."""
    made = roster(3, spares, is_elastic=is_elastic)
    for name in lost:
        made.lose(name)
    before = made.lost
    newest = made.advance()
    assert newest == (None if members is None else Generation(1, tuple(members), before))
    assert (made.state is RosterState.GATHERING) == (members is None and lost != "x")


def test_a_loss_while_it_forms_replaces_the_generation() -> None:
    made = roster(3, "xy")
    made.lose("a")
    assert made.advance() == Generation(1, ("x", "b", "c"), ("a",))
    made.arrive("b", 1)
    made.lose("x")
    assert made.advance() == Generation(2, ("y", "b", "c"), ("x",))
    made.arrive("c", 1)  # too late: of the generation before
    assert made.state is RosterState.FORMING
    arrive_all(made)


def test_it_waits_for_a_spare() -> None:
    made = roster(2)
    made.lose("a")
    assert made.advance() is None
    assert made.state is RosterState.GATHERING
    made.join("x")
    assert made.advance() == Generation(1, ("x", "b"), ("a",))


def test_an_elastic_group_takes_a_late_process_in() -> None:
    made = roster(2, is_elastic=True)
    made.lose("a")
    assert made.advance() == Generation(1, ("b",), ("a",))
    arrive_all(made)
    made.join("x")
    assert made.advance() == Generation(2, ("b", "x"))


def test_below_its_least_size_it_waits() -> None:
    made = roster(3, is_elastic=True, min_size=2)
    made.lose("a")
    made.lose("b")
    assert made.advance() is None


def test_it_gives_up_without_a_step() -> None:
    """The same step ends each replacement, as a defect of the user's code would."""
    made = roster(1, "".join(chr(ord("A") + number) for number in range(2 * MAX_WITHOUT_STEP)))
    made.step(7)
    for _ in range(MAX_WITHOUT_STEP):
        assert made.newest is not None
        made.lose(made.newest.members[0])
        assert made.advance() is not None
        made.step(7)
    assert made.newest is not None
    made.lose(made.newest.members[0])
    assert made.advance() is None
    assert made.state is RosterState.GIVEN_UP


def test_nobody_is_replaced_once_it_is_done() -> None:
    made = roster(2, "x")
    made.finish()
    made.lose("a")
    assert made.advance() is None
