"""A real browser for tests: headless Chromium over its debugging pipe, with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
)
HAND_OVER = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
"""Puts the pipes where the protocol wants them, 3 to read and 4 to write, and becomes the browser."""

PATIENCE = 60.0
"""Seconds after which a silent browser is given up: many times what any answer takes."""


def chromium() -> str | None:
    """The path of an installed Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page: commands of the Chrome DevTools Protocol, and what the page complained about."""

    def __init__(self, writes: int, reads: int) -> None:
        self.writes, self.reads, self.pending = writes, reads, b""
        self.count, self.session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while (found := self._receive()).get("id") != self.count:
            self.events.append(found)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return found["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            if not select.select([self.reads], [], [], PATIENCE)[0]:
                raise TimeoutError(f"the browser was silent for {PATIENCE:g} s")
            chunk = os.read(self.reads, 1 << 20)
            if not chunk:
                raise ConnectionError("the browser has gone")
            self.pending += chunk
        message, _, self.pending = self.pending.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path | str) -> None:
        """Load a file, or an address, and wait until it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression, or a promise of it, comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        """The text of the first element that matches."""
        return self.value(f"document.querySelector({json.dumps(selector)}).textContent")

    def press(self, key: str, code: int) -> None:
        """A key down and up again, as from a keyboard."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """The mouse pressed and released in the middle of the first element that matches."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, media: str = "", dark: bool = False) -> None:
        """As on "screen" or in "print", light or dark; without animations."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def scripts(self, run: bool) -> None:
        self.call("Emulation.setScriptExecutionDisabled", value=not run)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot as PNG: of the window, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the page since it was opened."""
        self.value("1")  # so that events on their way have come
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["text"])
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened."""
        found = [e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in found]


def _high(end: int) -> int:
    """The same end of a pipe by a number that the protocol does not use."""
    copy = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return copy


@contextlib.contextmanager
def browser(binary: str, profile: Path) -> Iterator[Tab]:
    """A tab of a fresh browser, which is gone at the end; ``profile`` is a folder for its files."""
    theirs_in, ours_out, ours_in, theirs_out = (_high(end) for _ in range(2) for end in os.pipe())

    launch = [sys.executable, "-I", "-S", "-c", HAND_OVER, str(theirs_in), str(theirs_out)]
    command = [*launch, binary, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    quiet, kept = subprocess.DEVNULL, (theirs_in, theirs_out)
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=kept)
    for end in kept:
        os.close(end)
    try:
        yield Tab(ours_out, ours_in)
    finally:
        for end in (ours_out, ours_in):
            os.close(end)  # which ends the browser
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
