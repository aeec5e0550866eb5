"""The report: its values for real runs, its size, and its rendering by Chromium at three screen sizes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import outlast.cluster
from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.format.layout import launch_dir
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.events import parse_event
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.liveness import LivenessFile
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.monitoring.report.page_data import MAX_POINTS, MAX_SPANS, page_data, thin
from outlast.cluster.monitoring.report.report import Report, run_report
from outlast.cluster.monitoring.status import take_snapshot
from outlast.cluster.monitoring.timeline import Timeline
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.browser import CHROMIUM, Browser, Page, chromium
from tests.support.groups.worker_group import StopAt, fault, run_group
from tests.support.small_model import small_model
from tests.support.timelines import (
    attempt,
    done,
    evaluated,
    failure,
    launch,
    make_timeline,
    plan,
    resume,
    saved,
    start,
    steps,
)

OUTLAST = str(Path(sys.executable).with_name("outlast"))
SIZES = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1440, 900)}
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


# -- real runs ---------------------------------------------------------------------------------------------------------


def _note_failure(storage: LocalStorage, run: str, number: int) -> None:
    """Write the failure event of the launch, which these groups without Ray lack."""
    ended = list_attempts(RunStore(storage, run))[-1]
    event = parse_event(failure(str(ended), time.time()))
    Journal(storage, launch_dir(run, "first"), number, flush_s=0).write(replace(event, t=0.0))


@pytest.fixture(scope="module")
def killed(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path_factory: pytest.TempPathFactory
) -> LocalStorage:
    """A run that was killed twice and restored twice, with evaluations."""
    alive, folder = (
        LivenessFile(storage, f"{launch_dir('killed', 'first')}/alive.json"),
        tmp_path_factory.mktemp("faults"),
    )
    for number, step in enumerate((10, 20), start=1):
        deadly = fault(FaultPoint.STEP, step, 1, FaultAction.SIGKILL, folder)
        assert run_group(assign("killed", steps=30, faults=(deadly,)), storage, 2)[1].exit_code == -9
        _note_failure(storage, "killed", number)
    assert run_group(assign("killed", steps=30), storage, 2)[0].outcome is Outcome.DONE
    alive.end(0)
    return storage


@pytest.fixture(scope="module")
def empty(storage: LocalStorage) -> Iterator[LocalStorage]:
    """A run whose driver has just begun."""
    alive = LivenessFile(storage, f"{launch_dir('empty', 'first')}/alive.json")
    yield storage
    alive.end(75)


@pytest.fixture(scope="module")
def elastic(assign: Callable[..., Assignment], storage: LocalStorage) -> LocalStorage:
    """A run on two workers, then one, then four."""
    alive = LivenessFile(storage, f"{launch_dir('elastic', 'first')}/alive.json")
    for size, stop in ((2, 8), (1, 16), (4, 99)):
        given = assign("elastic", steps=24, sections={"exactness": "elastic"})
        ended = run_group(given, storage, size, StopAt(stop))
        assert ended[0].outcome is (Outcome.DONE if stop == 99 else Outcome.STOPPED)
    alive.end(0)
    return storage


def test_report_of_a_run_that_was_killed_twice(killed: LocalStorage) -> None:
    page = Report.of(killed, "killed").to_html()
    data = data_of(page)
    assert (data["state"], data["step"], data["num_steps"]) == ("done", 30, 30)
    kinds = [mark["kind"] for mark in data["markers"]]
    assert (kinds.count("failure"), kinds.count("restore")) == (2, 2)
    assert [item["from"] for item in data["attempts"]] == [None, 9, 18]
    assert [item["cause"] for item in data["attempts"]] == ["worker died", "worker died", "done"]
    assert data["by_step"]["x"] == list(range(1, 31))
    assert data["by_step"]["eval"]["x"] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert data["num_lost_steps"] == sum(end - begin for begin, end in data["redone"]["steps"])
    assert sum(kind["seconds"] for kind in data["categories"]) == pytest.approx(data["wall_s"])
    rows = data["checkpoints"]["rows"]
    assert [row["step"] for row in rows] == [30, 27, 24]
    assert {row["verification"] for row in rows} == {"unverified"}
    assert all(len(row["digest"]) == 32 and row["num_files"] == len(row["files"]) > 5 for row in rows)
    assert "train_bpe: 400" in data["settings"]
    assert data["changes"] == []
    assert "https://github.com/leeoniya/uPlot (v1." in page
    assert "Copyright (c) 2022 Leon Sorokin" in page


def test_report_of_a_run_that_changed_its_size(elastic: LocalStorage) -> None:
    data = data_of(Report.of(elastic, "elastic").to_html())
    assert {2, 1, 4, 0} == set(data["workers"]["y"])
    assert data["workers"]["x"] == sorted(data["workers"]["x"])
    sizes = [(item["attempt"], item["before"], item["now"]) for item in data["changes"] if item["key"] == "world_size"]
    assert sizes == [(2, 2, 1), (3, 1, 4)]
    assert {mark["kind"] for mark in data["markers"]} == {"end", "restore"}
    assert data["num_lost_steps"] == 0


def test_report_of_a_run_that_has_just_begun(empty: LocalStorage) -> None:
    data = data_of(Report.of(empty, "empty").to_html())
    assert (data["state"], data["attempts"], data["checkpoints"]["rows"]) == ("starting", [], [])


def test_a_custom_loop_began_with_its_first_claim(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    mine = Checkpointer(storage, "own")
    model, optimizer = small_model()
    mine.save(1, model, optimizer, {"step": 1})
    mine.flush()
    claimed = read_claim(RunStore(storage, "own"), mine.attempt)["claimed_at"]
    assert data_of(Report.of(storage, "own").to_html())["begin"] == pytest.approx(claimed)


def test_verified_means_that_every_byte_was_read(killed: LocalStorage, tmp_path: Path) -> None:
    shutil.copytree(killed.path("killed"), tmp_path / "killed", symlinks=True)
    copy = LocalStorage(tmp_path)
    assert {row["verification"] for row in Report.of(copy, "killed", verify=True).data["checkpoints"]["rows"]} == {
        "verified"
    }
    weights = next((tmp_path / "killed/attempts").glob("*/checkpoint-27/model.safetensors"))
    body = bytearray(weights.read_bytes())
    body[-7] ^= 1
    weights.write_bytes(body)
    rows = {row["step"]: row for row in Report.of(copy, "killed", verify=True).data["checkpoints"]["rows"]}
    assert {step: row["verification"] for step, row in rows.items()} == {30: "verified", 27: "damaged", 24: "verified"}
    assert "model.safetensors: bytes changed" in rows[27]["detail"]


def test_the_report_command(killed: LocalStorage, tmp_path: Path) -> None:
    done = subprocess.run(
        [OUTLAST, "report", str(killed.path("killed"))], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip()) == (0, "killed-report.html"), done.stderr
    assert data_of((tmp_path / "killed-report.html").read_text())["run"] == "killed"
    with pytest.raises(ConfigError, match="there is no run 'nobody'"):
        run_report("nobody", str(tmp_path))


# -- timelines made by hand --------------------------------------------------------------------------------------------


def page_of(timeline: Timeline, now: float) -> str:
    return Report(
        {**page_data(timeline, take_snapshot(timeline, now), None, set(), None, {}), "version": "0"}
    ).to_html()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(2, 60))
def test_thinning_keeps_the_extremes_and_the_order(values: list[float], most: int) -> None:
    column = np.array(values)
    kept = thin(column, most)
    assert len(kept) <= max(most, 4)
    assert list(kept) == sorted(set(kept))
    assert column[kept].max() == column.max()
    assert column[kept].min() == column.min()


def long_timeline(number: int) -> Timeline:
    """Make `number` steps with a spike, an evaluation and a save every thousand, and a failure in the middle."""
    half = number // 2
    timeline = make_timeline(
        launch("a", 0, 10.0 + number, None, failure(1, 20.0 + half)),
        attempt(1, 5, start(6), plan(7, 2 * number)),
        attempt(2, 30.0 + half, resume(31.0 + half, half - 100), plan(32.0 + half, 2 * number)),
    )
    for item, first, last, begin in zip(
        timeline.claimed_attempts, (1, half - 99), (half, number), (10, 40 + half), strict=True
    ):
        numbers = np.arange(first, last + 1)
        columns = item.steps
        columns.step = array("q", numbers.tolist())
        columns.loss = array("d", (3 + 5 / np.sqrt(numbers) + 0.1 * np.sin(numbers)).tolist())
        columns.lr = columns.grad_norm = array("d", np.full(len(numbers), 1e-3).tolist())
        columns.tokens = array("q", np.full(len(numbers), 4096).tolist())
        columns.seconds = array("d", np.full(len(numbers), 0.9).tolist())
        columns.ended_at = array("d", (begin + np.arange(1, len(numbers) + 1)).tolist())
        columns.loss[len(numbers) // 3] = 99.0
        for step in range(first + 999, last, 1000):
            at = columns.ended_at[step - first]
            for event in (evaluated(step, at, at + 0.1), *saved(step, at + 0.1)):
                item.apply(event)
    return timeline


def test_a_million_steps_are_a_small_page() -> None:
    timeline = long_timeline(1_000_000)
    page = page_of(timeline, 1_000_010.0)
    data = data_of(page)
    assert len(page.encode()) < 2_000_000
    assert len(data["by_step"]["x"]) <= MAX_POINTS
    assert len(data["spans"]) <= MAX_SPANS
    assert data["spans"][0][0] == 0
    assert all(before[1] == after[0] for before, after in zip(data["spans"], data["spans"][1:], strict=False))
    assert data["by_step"]["loss"].count(99.0) == 2
    assert data["by_step"]["x"][-1] == 1_000_000


@pytest.mark.parametrize("loss", [nan, inf, -inf])
def test_an_evaluation_that_is_not_finite_is_left_out_of_the_charts(loss: float) -> None:
    strange = {**evaluated(9, 21, 22), "eval_loss": loss, "eval_accuracy": 0.5}
    timeline = make_timeline(
        launch("a", 0, 90), attempt(1, 10, start(11), evaluated(0, 12, 13), steps(1, 9, 13), strange)
    )
    data = data_of(page_of(timeline, 100.0))
    assert data["scores"] == {"eval_loss": None, "eval_accuracy": 0.5}
    assert data["by_step"]["eval"] == {"x": [0], "loss": [2.0]}
    assert data["by_time"]["eval"] == {"x": [13.0], "loss": [2.0]}


HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\u2028&amp;'


def hostile_timeline() -> Timeline:
    return make_timeline(
        launch("a", 0, 90, 1, {**failure(1, 30), "message": HOSTILE, "where": HOSTILE, "cause": HOSTILE}),
        attempt(
            1, 10, start(11), plan(12), steps(1, 9, 12), {**evaluated(9, 21, 22), f"eval_{HOSTILE}": 1.0},
            {"event": "changed", "t": 12, "what": HOSTILE, "before": HOSTILE, "now": HOSTILE},
            settings={"name": HOSTILE, HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}, device=HOSTILE,
            workers=[{"rank": 0, "host": HOSTILE}],
        ),
        attempt(2, 40, resume(41, 5), settings={"name": HOSTILE, HOSTILE: "other"}),
        run=HOSTILE,
    )  # fmt: skip


def test_user_text_is_never_html() -> None:
    page = page_of(hostile_timeline(), 100.0)
    clean = page_of(make_timeline(launch("a", 0, 90, 1)), 100.0)
    assert page.count("</script>") == clean.count("</script>")
    assert page.count("<img") == clean.count("<img") == 0
    assert data_of(page)["run"] == HOSTILE


def test_a_notebook_shows_the_report_in_a_frame() -> None:
    inline = Report(data_of(page_of(hostile_timeline(), 100.0)))._repr_html_()
    assert inline.startswith('<iframe sandbox="allow-scripts"')
    assert inline.count("<") == 2
    assert outlast.cluster.run_report is run_report


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


CHARTS = """Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => [chart.id, {
    drawn: !!chart.querySelector("canvas"), markers: +(chart.dataset.markers || 0), bands: +(chart.dataset.bands || 0),
    inside: chart.getBoundingClientRect().right <= innerWidth }]))"""


OVER = """[...document.querySelectorAll("body *")]
    .filter((node) => node.getBoundingClientRect().right > innerWidth + 1).length"""


def opened(browser: Browser, path: Path, size: str, *, dark: bool = False) -> dict[str, Any]:
    """Open a page, save a screenshot, and return what it shows."""

    async def use(page: Page) -> dict[str, Any]:
        await page.picture(path.with_name(f"{path.stem}-{size}-{'dark' if dark else 'light'}.png"), whole=True)
        return {
            "ready": await page.evaluate("document.documentElement.dataset.ready"),
            "charts": await page.evaluate(CHARTS),
            "scrolls": await page.evaluate("document.documentElement.scrollWidth > innerWidth"),
            "over": await page.evaluate(OVER),
            "text": await page.evaluate("document.body.innerText"),
            "hacked": await page.evaluate("window.hacked"),
            "complaints": page.complaints,
            "requests": page.requests,
        }

    return browser.open(path.as_uri(), SIZES[size], use, dark=dark)


def check_page(seen: dict[str, Any]) -> None:
    """Assert what holds for every page."""
    assert seen["ready"] == "yes"
    assert seen["complaints"] == []
    assert seen["requests"] == []
    assert not seen["scrolls"]
    assert seen["over"] == 0
    assert all(chart["inside"] for chart in seen["charts"].values())
    assert seen["hacked"] is None


@needs_chromium
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_render_on_all_screen_sizes(
    browser: Browser,
    killed: LocalStorage,
    elastic: LocalStorage,
    empty: LocalStorage,
    tmp_path: Path,
    size: str,
    dark: bool,
) -> None:
    seen = {}
    for run, place in {"killed": killed, "elastic": elastic, "empty": empty}.items():
        path = tmp_path / f"{run}.html"
        path.write_text(Report.of(place, run).to_html())
        seen[run] = opened(browser, path, size, dark=dark)
        check_page(seen[run])
    charts = {run: found["charts"] for run, found in seen.items()}
    assert all(chart["drawn"] for run in ("killed", "elastic") for chart in charts[run].values())
    assert charts["killed"]["by-step"]["markers"] == charts["killed"]["by-time"]["markers"] == 4
    assert charts["killed"]["by-step"]["bands"] == 2
    assert charts["elastic"]["by-step"]["markers"] == 4
    assert not any(chart["drawn"] for chart in charts["empty"].values())
    assert seen["empty"]["text"].count("nothing yet") == 5
    for words in ("Attempt 3", "worker died", "not verified", "train_bpe"):
        assert words in seen["killed"]["text"]


@needs_chromium
def test_a_tooltip_shows_the_values_at_the_cursor(browser: Browser, tmp_path: Path) -> None:
    """The cursor is at a fraction of each chart: of 100 steps, or of 200 seconds."""
    timeline = make_timeline(
        launch("a", 0, 200, 0, failure(1, 81.5)),
        attempt(1, 20, start(21), plan(22), steps(1, 50, 30), saved(40, 70), evaluated(50, 80, 81), world_size=2),
        attempt(2, 100, resume(110, 40), plan(111), steps(41, 100, 120), done(200)),
    )
    path = tmp_path / "hovered.html"
    path.write_text(page_of(timeline, 300.0))

    async def use(page: Page) -> dict[str, str]:
        tooltips = {}
        for chart, part in {"by-step": 0.41, "by-time": 0.41, "workers": 0.41, "speed": 0.7, "lr": 0.41}.items():
            await page.evaluate(f"document.getElementById('{chart}').scrollIntoView()")
            place = await page.evaluate(f"document.querySelector('#{chart} .u-over').getBoundingClientRect().toJSON()")
            await page.point_at(place["x"] + part * place["width"], place["y"] + place["height"] / 2)
            tooltips[chart] = await page.evaluate(f"document.querySelector('#{chart} .tip').innerText")
        assert page.complaints == []
        return tooltips

    tooltips = browser.open(path.as_uri(), SIZES["desktop"], use)
    assert tooltips["by-step"] == "step 41\nloss 0.2439\nlr 0.001\nattempt 2 resumed from step 40"
    assert tooltips["by-time"].splitlines()[-1] == "worker died (rank 1): it was killed"
    assert tooltips["workers"] == "after 1 min 22 s\n0 workers"
    assert tooltips["speed"].endswith("80 tokens/s")
    assert tooltips["lr"] == "step 41\nlr 0.001"


def test_the_last_step_of_an_attempt_is_that_of_its_lost_steps() -> None:
    """The journal of a killed rank 0 ends before what the coordinator received."""
    timeline = make_timeline(
        launch("a", 0, 200, 0, failure(1, 50, reached={"step": 19, "ended_at": 49.0})),
        attempt(1, 20, start(21), plan(22), steps(1, 17, 30), saved(10, 41)),
        attempt(2, 100, resume(110, 10), plan(111), steps(11, 40, 120), done(200, 40)),
    )
    data = data_of(page_of(timeline, 300.0))
    assert [tuple(row["steps"]) for row in data["attempts"]] == [(1, 19), (11, 40)]
    assert data["num_lost_steps"] == 19 - 10
    assert [mark["step"] for mark in data["markers"]] == [19, 10]


@needs_chromium
def test_each_score_has_a_chart(browser: Browser, tmp_path: Path) -> None:
    scored = [
        {**evaluated(step, 30 + step, 30.5 + step), "eval_accuracy": step / 50, "eval_f1": 0.5} for step in (9, 19)
    ]
    timeline = make_timeline(
        launch("a", 0, 99, 0), attempt(1, 20, start(21), plan(22), steps(1, 20, 30), scored, done(60))
    )
    path = tmp_path / "scored.html"
    path.write_text(page_of(timeline, 99.0))
    assert data_of(path.read_text())["scores_by_step"][0] == {"name": "accuracy", "x": [9, 19], "y": [0.18, 0.38]}
    seen = opened(browser, path, "phone")
    check_page(seen)
    assert seen["charts"]["score-0"]["drawn"]
    assert seen["charts"]["score-1"]["drawn"]
    assert "accuracy, by step" in seen["text"]


@needs_chromium
def test_hostile_text_and_a_million_steps_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    for name, timeline in {"hostile": hostile_timeline(), "long": long_timeline(1_000_000)}.items():
        path = tmp_path / f"{name}.html"
        path.write_text(page_of(timeline, 1_000_010.0))
        for size in SIZES:
            check_page(opened(browser, path, size))
    inline = tmp_path / "inline.html"
    inline.write_text(
        "<!doctype html><title>notebook</title>" + Report(data_of(page_of(hostile_timeline(), 100.0)))._repr_html_()
    )

    async def use(page: Page) -> list[str]:
        await page.evaluate("new Promise((done) => setTimeout(done, 300))")
        await page.picture(tmp_path / "inline.png")
        return page.complaints

    assert browser.open(inline.as_uri(), SIZES["desktop"], use) == []
