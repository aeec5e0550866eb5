"""The live panel: a run at a glance in a few lines, from 40 columns on. Pure; one renderer for all who show it.

No line is padded or framed, so that a terminal that is made narrower has nothing to wrap. Colour says nothing that the
words do not say too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich.text import Text

from outlast.cluster.formatting import clock, duration, share, short, size
from outlast.cluster.monitoring.goodput import GoodputReport, TimeCategory
from outlast.cluster.monitoring.run_summary import Interruption, RunSummary
from outlast.cluster.monitoring.timeline import State

#: Wider than this nothing gets.
MOST = 100
_LABEL = 9
#: What took a smaller share of the time is in the bar, but not in the words.
_LITTLE = 0.005
_SPARKS = "▁▂▃▄▅▆▇█"
_COLOURS = {
    TimeCategory.TRAIN: "green",
    TimeCategory.EVALUATE: "cyan",
    TimeCategory.SAVE: "blue",
    TimeCategory.DETECT: "red",
    TimeCategory.RESTART: "yellow",
    TimeCategory.RESTORE: "magenta",
    TimeCategory.REDO: "bright_red",
    TimeCategory.WAIT: "bright_black",
}
_STATES = {State.DONE: "bold green", State.FAILED: "bold red", State.LOST: "bold red", State.STOPPED: "bold yellow"}


def panel(seen: RunSummary, width: int, *, num_interruptions: int = 3) -> list[Text]:
    """The panel's lines, none wider than `width`.

    Args:
        seen: The run.
        width: Columns.
        num_interruptions: How many of the newest are shown.
    """
    width = min(width, MOST)
    lines = [_head(seen, width), *_bar(seen, width), *_loss(seen, width)]
    lines += _labelled("speed", _speed(seen), width)
    lines += _labelled("saved", _saved(seen), width)
    lines += _goodput(seen.ledger, width)
    lines += _interrupted(seen, width, num_interruptions)
    for slow in seen.slow:
        text = f"rank {slow.rank} on {slow.host}, {slow.times} times as slow as the others"
        lines += _labelled("slow", [Text(text, "yellow")], width)
    return lines


def plain(seen: RunSummary) -> str:
    """The same in one line, where there is no terminal."""
    parts = [f"step {seen.step}/{seen.num_steps or '?'}"]
    if seen.loss is not None:
        parts.append(f"loss {seen.loss:.3f}")
    parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in _main_score(seen)]
    if seen.lr is not None:
        parts.append(f"lr {seen.lr:.3g}")
    if rate := _rate(seen):
        parts.append(rate)
    if seen.left_s:
        parts.append(f"{duration(seen.left_s)} left")
    return "  ".join(parts)


# -- the lines ---------------------------------------------------------------------------------------------------------


def _head(seen: RunSummary, width: int) -> Text:
    line = Text()
    line.append(f"{seen.run}  ", "bold")
    line.append(seen.doing, _STATES.get(seen.state, "bold"))
    parts = [f"attempt {seen.attempt}"] if seen.attempt is not None else []
    if seen.world_size:
        parts.append(f"{seen.world_size} worker{'s' if seen.world_size > 1 else ''}")
    if seen.ledger.wall_s:
        parts.append(f"{duration(seen.ledger.wall_s)} in all")
    for part in parts:
        if line.cell_len + 2 + len(part) <= width:
            line.append(f", {part}")
    return _cut(line, width)


def _bar(seen: RunSummary, width: int) -> list[Text]:
    if not seen.num_steps:
        return []
    done = min(1.0, seen.step / seen.num_steps)
    words = [f"{seen.step:,}/{seen.num_steps:,} {share(done)}"]
    if seen.left_s:
        words.append(f"{duration(seen.left_s)} left")
    room = min(40, width - _LABEL - len(", ".join(words)) - 2)
    if room < 8:
        return _labelled("step", [Text(word) for word in words], width)
    line, full = _begun("step"), round(done * room)
    line.append("━" * full, "green")
    line.append("─" * (room - full), "bright_black")  # lighter also where there are no colours
    line.append("  " + ", ".join(words))
    return [_cut(line, width)]


def _loss(seen: RunSummary, width: int) -> list[Text]:
    if seen.loss is None:
        return []
    parts = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in _main_score(seen)]
    if seen.lr is not None:
        parts.append(f"lr {seen.lr:.3g}")
    number = f"{seen.loss:.3f}"
    room = min(32, width - _LABEL - len("  ".join([number, *parts])) - 2)
    if room < 8:
        return _labelled("loss", [Text(number, "bold"), *map(Text, parts)], width)
    line = _begun("loss")
    line.append(number, "bold")
    if len(seen.losses) > 1:
        line.append("  " + sparkline(seen.losses, room), "green")
    line.append("".join(f"  {part}" for part in parts))
    return [_cut(line, width)]


def _main_score(seen: RunSummary) -> Iterable[tuple[str, float]]:
    return [("eval_loss", seen.scores["eval_loss"])] if "eval_loss" in seen.scores else []


def _rate(seen: RunSummary) -> str:
    if seen.tokens_per_s:
        return f"{short(seen.tokens_per_s)} tokens/s"
    return f"{short(seen.samples_per_s)} samples/s" if seen.samples_per_s else ""


def _speed(seen: RunSummary) -> list[Text]:
    parts = [Text(_rate(seen))] if _rate(seen) else []
    if seen.seconds_per_step:
        parts.append(Text(f"{duration(seen.seconds_per_step)} a step"))
    return parts


def _saved(seen: RunSummary) -> list[Text]:
    parts = []
    if newest := seen.newest:
        text = f"step {newest.step:,}"
        if newest.committed_at:
            text += f", {duration(max(0.0, seen.now - newest.committed_at))} ago"
        parts.append(Text(text))
        if newest.num_bytes:
            parts.append(Text(size(newest.num_bytes)))
        if newest.verified_at:
            parts.append(Text(f"read back whole {clock(newest.verified_at, seen.now)}", "green"))
        else:
            parts.append(Text("not read back yet", "dim"))
    elif seen.state.is_live:
        parts.append(Text("nothing yet", "dim"))
    if seen.save and seen.save.commit_s is not None and seen.save.blocked_s is not None:
        parts.append(Text(f"takes {duration(seen.save.commit_s)}"))
        parts.append(Text(f"stall {duration(seen.save.blocked_s)}"))
    return parts


def _goodput(ledger: GoodputReport, width: int) -> list[Text]:
    if ledger.goodput is None:
        return []
    line = _begun("goodput")
    line.append(share(ledger.goodput), "bold")
    room = min(40, width - line.cell_len - 2)
    parts = [(kind, seconds) for kind, seconds in ledger.seconds.items() if seconds > 0]
    if room >= 16:
        line.append("  ")
        for kind, columns in zip((kind for kind, _ in parts), _apportion([s for _, s in parts], room), strict=True):
            line.append(("█" if kind is TimeCategory.TRAIN else "▒") * columns, _COLOURS[kind])
    words = [
        Text(f"{kind.words} {duration(seconds)}", _COLOURS[kind])
        for kind, seconds in sorted(parts, key=lambda part: -part[1])
        if seconds >= _LITTLE * ledger.wall_s
    ]
    return [_cut(line, width), *_labelled("", words, width)]


def _interrupted(seen: RunSummary, width: int, number: int) -> list[Text]:
    if not seen.interruptions:
        return []
    count = len(seen.interruptions)
    words = f"{seen.num_lost:,} step{'' if seen.num_lost == 1 else 's'}, in {count} interruption{'s'[: count - 1]}"
    lines = _labelled("lost", [Text(words)], width)
    for item in seen.interruptions[-number:] if number else ():
        lines.append(_cut(_begun("").append_text(_told(item, seen.now)), width))
    return lines


def _told(item: Interruption, now: float) -> Text:
    line = Text()
    line.append(f"{clock(item.at, now)}  ", "dim")
    line.append(item.cause, "yellow")
    if item.rank is not None:
        line.append(f" (rank {item.rank})")
    if item.resumed_from is not None:
        line.append(f" → from step {item.resumed_from:,}")
    if item.message:
        words = " ".join(item.message.split())
        line.append(f": {''.join(letter for letter in words if letter.isprintable())}", "dim")
    return line


# -- how they are laid out ---------------------------------------------------------------------------------------------


def _labelled(label: str, parts: Sequence[Text], width: int) -> list[Text]:
    """The parts behind a label, separated by commas, in as many lines as they need."""
    lines: list[Text] = []
    for part in parts:
        part = _cut(part, max(8, width - _LABEL - 1))
        if lines and lines[-1].cell_len + 2 + part.cell_len < width:
            lines[-1].append(", ")
        else:
            if lines:
                lines[-1].append(",")
            lines.append(_begun("" if lines else label))
        lines[-1].append_text(part)
    return [_cut(line, width) for line in lines]


def _begun(label: str) -> Text:
    """A line with its label."""
    line = Text()
    line.append(f"{label:{_LABEL}}", "dim")
    return line


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as so many bars, each the mean of its part; few values make few bars."""
    width = min(width, len(values))
    bounds = [round(index * len(values) / width) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    top = len(_SPARKS) - 1
    return "".join(_SPARKS[round((mean - low) / (high - low) * top) if high > low else top // 2] for mean in means)


def _apportion(parts: Sequence[float], room: int) -> list[int]:
    """Whole columns for each part, `room` in all; what is little still gets one, as long as there is room."""
    total = sum(parts)
    columns = [max(1, round(part / total * room)) for part in parts]
    while sum(columns) != room:
        index = max(range(len(parts)), key=lambda i: columns[i])
        columns[index] += 1 if sum(columns) < room else -1
    return columns
