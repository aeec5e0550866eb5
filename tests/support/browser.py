"""A real headless Chromium, driven over its DevTools protocol: opens a page, counts what goes wrong, takes pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
_LIMIT_S = 60.0
T = TypeVar("T")


@dataclass(slots=True)
class Page:
    """One tab.

    Attributes:
        complaints: What the page wrote to its console as a warning or an error, and exceptions.
        requests: Everything that it fetched, but the page itself and what lies within it.
    """

    _call: Callable[..., Coroutine[Any, Any, Any]]
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = await self._call("Runtime.evaluate", given)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def point_at(self, x: float, y: float) -> None:
        """Moves the mouse there."""
        await self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    async def picture(self, path: Path, *, whole: bool = False) -> None:
        """Takes a PNG of what is to be seen, or of the whole page."""
        answer = await self._call("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(answer["data"]))

    def apply(self, method: str, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("warning", "error", "assert"):
            self.complaints.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("warning", "error"):
            self.complaints.append(str(told["entry"]))
        elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("data:", "file:")):
            self.requests.append(told["request"]["url"])


async def _open(
    port: int, url: str, size: tuple[int, int], dark: bool, use: Callable[[Page], Coroutine[Any, Any, T]]
) -> T:
    address = f"http://127.0.0.1:{port}/json/new?about:blank"
    async with aiohttp.ClientSession() as session:
        async with session.put(address) as answer:
            tab = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(tab, max_msg_size=0) as line:
            waiting: dict[int, asyncio.Future[Any]] = {}
            loaded = asyncio.Event()

            async def call(method: str, given: dict[str, Any] | None = None) -> Any:
                number = len(waiting)
                waiting[number] = asyncio.get_running_loop().create_future()
                await line.send_str(json.dumps({"id": number, "method": method, "params": given or {}}))
                return await asyncio.wait_for(waiting[number], _LIMIT_S)

            page = Page(call)

            async def listen() -> None:
                async for message in line:
                    body = json.loads(message.data)
                    if "id" in body:
                        assert "error" not in body, body
                        waiting[body["id"]].set_result(body["result"])
                    else:
                        page.apply(body["method"], body["params"])
                        if body["method"] == "Page.loadEventFired":
                            loaded.set()

            listening = asyncio.create_task(listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await call(f"{domain}.enable")
            width, height = size
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            await call("Emulation.setDeviceMetricsOverride", metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await call("Emulation.setEmulatedMedia", {"features": [scheme]})
            await call("Page.navigate", {"url": url})
            await asyncio.wait_for(loaded.wait(), _LIMIT_S)
            try:
                return await use(page)
            finally:
                await call("Page.close")
                listening.cancel()


class Browser:
    """A running Chromium."""

    def __init__(self, port: int) -> None:
        self._port = port

    def open(
        self, url: str, size: tuple[int, int], use: Callable[[Page], Coroutine[Any, Any, T]], *, dark: bool = False
    ) -> T:
        """Opens a page in a window of so many pixels, and returns what `use` makes of it."""
        return asyncio.run(_open(self._port, url, size, dark, use))


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Chromium with a profile of its own in `folder`."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    log = folder / "log"
    with log.open("wb") as file:  # a group of its own, because the browser is many processes
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + _LIMIT_S
        while not (found := re.search(r"listening on ws://.*:(\d+)/", log.read_text(errors="replace"))):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.05)
        yield Browser(int(found[1]))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
