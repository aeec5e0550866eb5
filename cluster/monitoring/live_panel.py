"""The live panel: a run in a few lines of text, from 40 columns on. Pure; every command renders it here.

Lines are neither padded nor framed, so a terminal that is made narrower has nothing to wrap. Colours carry no
information that the words lack.
"""

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

from outlast.checkpointing.run_store.events import UnsavedEvent
from outlast.cluster.formatting import clock, counted, duration, share, short, size
from outlast.cluster.monitoring.goodput import GoodputReport, TimeCategory
from outlast.cluster.monitoring.status import Interruption, RunSnapshot
from outlast.cluster.monitoring.timeline import State
from outlast.cluster.output import safe_line
from outlast.cluster.safe_console import safe_text

MAX_WIDTH = 100
_LABEL_WIDTH = 9
_NUM_SCORES, _NUM_PLAIN_SCORES = 6, 2
#: The bar shows every category; the words leave out those with a smaller share.
_MIN_SHARE = 0.005
_SPARKS = "▁▂▃▄▅▆▇█"
_COLOURS = {
    TimeCategory.TRAIN: "green",
    TimeCategory.EVALUATE: "cyan",
    TimeCategory.SAVE: "blue",
    TimeCategory.DETECT: "red",
    TimeCategory.STARTUP: "bright_yellow",
    TimeCategory.REGROUP: "bright_cyan",
    TimeCategory.RESTART: "yellow",
    TimeCategory.RESTORE: "magenta",
    TimeCategory.REDO: "bright_red",
    TimeCategory.WAIT: "bright_magenta",
    TimeCategory.IDLE: "bright_black",
}
_STATES = {State.DONE: "bold green", State.FAILED: "bold red", State.LOST: "bold red", State.STOPPED: "bold yellow"}


def panel(summary: RunSnapshot, width: int, *, num_interruptions: int = 3) -> list[Text]:
    """Render a run in lines of at most `width` columns, with the newest interruptions."""
    width = min(width, MAX_WIDTH)
    lines = [_head(summary, width), *_progress(summary, width), *_loss(summary, width)]
    lines += _labelled("scores", [safe_text(text) for text in _other_scores(summary)[:_NUM_SCORES]], width)
    lines += _labelled("speed", list(map(Text, _speed(summary))), width)
    lines += _labelled("saved", _saved(summary), width)
    if summary.unsaved:
        lines += _labelled("unsaved", [Text(_unsaved(summary, summary.unsaved), "bold red")], width)
    lines += _goodput(summary.goodput, width)
    if summary.interruptions:
        lost, count = summary.num_lost_steps, len(summary.interruptions)
        text = f"{lost:,} step{'' if lost == 1 else 's'}, in {counted(count, 'interruption')}"
        is_saved = summary.newest is not None and summary.newest.step >= summary.step
        if summary.interruptions[-1].resumed_from is None and not is_saved:  # the next start determines what it loses
            text = f"{counted(count, 'interruption')}, the last one not resumed yet"
            text += f"; {lost:,} steps lost by the others" if lost else ""
        lines += _labelled("lost", [Text(text)], width)
        shown = summary.interruptions[-num_interruptions:] if num_interruptions else ()
        lines += [_cut(_line("").append_text(_interruption(item, summary.now)), width) for item in shown]
    lines += _regroupings(summary, width, num_interruptions)
    for slow in summary.slow:
        text = f"rank {slow.rank} on {slow.host}, {slow.times} times as slow as the others"
        lines += _labelled("slow", [safe_text(text, "yellow")], width)
    return lines


def plain_line(summary: RunSnapshot) -> str:
    """Render a run in one line of plain text, for output that is not a terminal."""
    parts = [f"step {summary.step}/{summary.num_steps or '?'}"]
    if summary.loss is not None:
        parts.append(f"loss {summary.loss:.3f}")
    parts += [*_score_and_lr(summary), *_other_scores(summary)[:_NUM_PLAIN_SCORES], *_rate(summary)]
    if summary.left_s:
        parts.append(f"{duration(summary.left_s)} left")
    if summary.unsaved:
        parts.append(f"unsaved: {_unsaved(summary, summary.unsaved)}")
    return "  ".join(parts)


# -- lines -------------------------------------------------------------------------------------------------------------


def _head(summary: RunSnapshot, width: int) -> Text:
    line = safe_text(f"{summary.run}  ", "bold").append_text(
        safe_text(summary.activity, _STATES.get(summary.state, "bold"))
    )
    parts = [f"attempt {summary.attempt}"] if summary.attempt is not None else []
    if summary.world_size:
        parts.append(counted(summary.world_size, "worker"))
    if summary.goodput.wall_s:
        parts.append(f"{duration(summary.goodput.wall_s)} total")
    for part in parts:
        if line.cell_len + 2 + len(part) <= width:
            line.append(f", {part}")
    return _cut(line, width)


def _progress(summary: RunSnapshot, width: int) -> list[Text]:
    if not summary.num_steps:
        is_known = summary.attempt is not None and summary.state is not State.UNATTENDED
        return _labelled("step", [Text(f"{summary.step:,}, as far as is recorded")], width) if is_known else []
    done = min(1.0, summary.step / summary.num_steps)
    parts = [f"{summary.step:,}/{summary.num_steps:,} {share(done)}"]
    if summary.left_s:
        parts.append(f"{duration(summary.left_s)} left")
    room = min(40, width - _LABEL_WIDTH - len(", ".join(parts)) - 2)
    if room < 8:
        return _labelled("step", [Text(part) for part in parts], width)
    full = round(done * room)
    line = _line("step").append("━" * full, "green")
    line.append("─" * (room - full), "bright_black")  # a lighter glyph too, for terminals without colours
    return [_cut(line.append("  " + ", ".join(parts)), width)]


def _loss(summary: RunSnapshot, width: int) -> list[Text]:
    if summary.loss is None:
        return []
    parts, number = _score_and_lr(summary), f"{summary.loss:.3f}"
    room = min(32, width - _LABEL_WIDTH - len("  ".join([number, *parts])) - 2)
    if room < 8:
        return _labelled("loss", [Text(number, "bold"), *map(Text, parts)], width)
    line = _line("loss").append(number, "bold")
    if len(summary.losses) > 1:
        line.append("  " + sparkline(summary.losses, room), "green")
    return [_cut(line.append("".join(f"  {part}" for part in parts)), width)]


def _other_scores(summary: RunSnapshot) -> list[str]:
    """Return the scores of the newest evaluation, such as the accuracy, without its loss."""
    names = [name for name in summary.scores if name != "eval_loss"]
    return [f"{name.removeprefix('eval_').replace('_', ' ')} {summary.scores[name]:.4g}" for name in names]


def _score_and_lr(summary: RunSnapshot) -> list[str]:
    parts = [f"eval loss {summary.scores['eval_loss']:.3f}"] if "eval_loss" in summary.scores else []
    return parts if summary.lr is None else [*parts, f"lr {summary.lr:.3g}"]


def _rate(summary: RunSnapshot) -> list[str]:
    rates = ((summary.tokens_per_s, "tokens/s"), (summary.samples_per_s, "samples/s"))
    return [f"{short(rate)} {unit}" for rate, unit in rates if rate][:1]


def _speed(summary: RunSnapshot) -> list[str]:
    parts = _rate(summary)
    return [*parts, f"{duration(summary.seconds_per_step)}/step"] if summary.seconds_per_step else parts


def _saved(summary: RunSnapshot) -> list[Text]:
    parts = []
    if newest := summary.newest:
        text = f"step {newest.step:,}"
        if newest.committed_at:
            text += f", {duration(max(0.0, summary.now - newest.committed_at))} ago"
        parts.append(Text(text))
        if newest.num_bytes:
            parts.append(Text(size(newest.num_bytes)))
        verified = newest.verified_at and Text(f"verified {clock(newest.verified_at, summary.now)}", "green")
        parts.append(verified or Text("not verified yet", "dim"))
    elif summary.state.is_live:
        parts.append(Text("nothing yet", "dim"))
    if summary.save and summary.save.commit_s is not None and summary.save.blocked_s is not None:
        parts.append(Text(f"takes {duration(summary.save.commit_s)}"))
        parts.append(Text(f"stall {duration(summary.save.blocked_s)}"))
    return parts


def _unsaved(summary: RunSnapshot, event: UnsavedEvent) -> str:
    """Return how long training has gone without a save that succeeded, and why."""
    seconds = event.unsaved_s + max(0.0, summary.now - event.t)
    limit = f" of {duration(event.limit_s)}" if event.limit_s is not None else ""
    return f"{duration(seconds)}{limit}: {safe_line(' '.join(event.error.split()))}"


def _goodput(report: GoodputReport, width: int) -> list[Text]:
    parts = [(category, seconds) for category, seconds in report.seconds.items() if seconds > 0]
    if report.goodput is None or not parts:
        return []
    line = _line("goodput").append(share(report.goodput), "bold")
    room = min(40, width - line.cell_len - 2)
    if room >= 16:
        line.append("  ")
        for (category, _), columns in zip(parts, _apportion([s for _, s in parts], room), strict=True):
            line.append(("█" if category is TimeCategory.TRAIN else "▒") * columns, _COLOURS[category])
    words = [
        Text(f"{category.label} {duration(seconds)}", _COLOURS[category])
        for category, seconds in sorted(parts, key=lambda part: -part[1])
        if seconds >= _MIN_SHARE * report.wall_s
    ]
    return [_cut(line, width), *_labelled("", words, width)]


def _regroupings(summary: RunSnapshot, width: int, number: int) -> list[Text]:
    """Return how often training went on in memory, how long that took, and the newest ones."""
    found = summary.regroupings
    if not found:
        return []
    redone = sum(item.num_redone for item in found)
    text = f"{counted(len(found), 'time')}, {duration(summary.regroup_s)} in all, "
    text += f"{counted(redone, 'step')} done again" if redone else "no step lost"
    lines = _labelled("regroup", [Text(text)], width)
    for item in found[-number:] if number else ():
        line = _line("").append(f"{clock(item.at, summary.now)}  ", "dim")
        line.append_text(safe_text(item.description, "bright_cyan"))
        lines.append(_cut(line.append(f" → {item.outcome}"), width))
    return lines


def _interruption(item: Interruption, now: float) -> Text:
    line = Text(f"{clock(item.at, now)}  ", "dim").append_text(safe_text(item.cause, "yellow"))
    if item.rank is not None:
        line.append(f" (rank {item.rank})")
    if item.resumed_from is not None:
        line.append(f" → from step {item.resumed_from:,}")
    if item.message:
        line.append_text(safe_text(f": {' '.join(item.message.split())}", "dim"))
    return line


# -- layout ------------------------------------------------------------------------------------------------------------


def _labelled(label: str, parts: Sequence[Text], width: int) -> list[Text]:
    """Put parts behind a label, separated by commas, in as many lines as they need."""
    lines: list[Text] = []
    for part in parts:
        part = _cut(part, max(8, width - _LABEL_WIDTH - 1))
        if lines and lines[-1].cell_len + 2 + part.cell_len < width:
            lines[-1].append(", ")
        else:
            if lines:
                lines[-1].append(",")
            lines.append(_line("" if lines else label))
        lines[-1].append_text(part)
    return [_cut(line, width) for line in lines]


def _line(label: str) -> Text:
    return Text.assemble((f"{label:{_LABEL_WIDTH}}", "dim"))


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as at most `width` bars, each the mean of its part."""
    width = min(width, len(values))
    bounds = [round(index * len(values) / width) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    top = len(_SPARKS) - 1
    return "".join(_SPARKS[round((mean - low) / (high - low) * top) if high > low else top // 2] for mean in means)


def _apportion(parts: Sequence[float], room: int) -> list[int]:
    """Divide `room` columns in proportion to the parts, with at least one for each."""
    total = sum(parts)
    columns = [max(1, round(part / total * room)) for part in parts]
    while sum(columns) != room:
        index = max(range(len(parts)), key=lambda i: columns[i])
        columns[index] += 1 if sum(columns) < room else -1
    return columns
