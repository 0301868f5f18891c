"""A headless Chromium for tests of pages, driven over its DevTools protocol through a pipe; no driver is needed.

The protocol is JSON, one message up to a zero byte, on the browser's file descriptors 3 (in) and 4 (out).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
SECONDS = 60  # that any answer may take
# Gives the pipes the numbers that the browser expects, then becomes the browser.
BECOME = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find_browser() -> str | None:
    """The Chromium on this machine, or the one that MOE_COMPRESS_BROWSER names."""
    named = os.environ.get("MOE_COMPRESS_BROWSER")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab: what it logged, what it asked of the network, and what its scripts say."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self._browser.call(method, parameters, self._session)

    def emulate(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """The size of the window in CSS pixels, and whether the system is dark."""
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, file: Path) -> None:
        """Load a file and wait until it is there."""
        self._browser.events.clear()
        self.call("Page.navigate", url=file.absolute().as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)

    def ask(self, expression: str) -> Any:
        """The value of a script's expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def touch(self, x: float, y: float) -> None:
        """Touch with a finger, and lift it."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        """Press and release a key by its name, such as `Tab` or `ArrowDown`."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        texts = {"Enter": "\r"}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]} | (
            {"text": texts[key]} if key in texts else {}
        )
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def complaints(self) -> list[str]:
        """Everything that the page wrote to the console, threw, or broke of its own policy."""
        found = []
        for event in self._browser.seen(self._session):
            if event["method"] == "Runtime.consoleAPICalled":
                found.append(str(event["params"]["args"]))
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                found.append(event["params"]["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        seen = self._browser.seen(self._session)
        return [e["params"]["request"]["url"] for e in seen if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of what is in the window."""
        clip: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": size | {"x": 0, "y": 0, "scale": 1}, "captureBeyondViewport": True}
        shot = self.call("Page.captureScreenshot", format="png", **clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed, A4."""
        found = self.call(
            "Page.printToPDF", printBackground=False, preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.69
        )
        return base64.b64decode(found["data"])


class Browser:
    """A running browser; its events are kept in the order they came."""

    def __init__(self, process: subprocess.Popen[bytes], incoming: int, outgoing: int) -> None:
        self._process = process
        self._incoming = incoming
        self._outgoing = outgoing
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def page(self) -> Page:
        """A new tab that is watched from its first request on."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", {}, session)
        return Page(self, session)

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._outgoing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait_for(self, method: str, session: str) -> None:
        while not any(event["method"] == method for event in self.seen(session)):
            self.events.append(self._next())

    def seen(self, session: str) -> list[dict[str, Any]]:
        """The events of one tab."""
        return [event for event in self.events if event.get("sessionId") == session and "method" in event]

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._incoming)
        os.close(self._outgoing)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._incoming], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer within {SECONDS} s"
            piece = os.read(self._incoming, 1 << 20)
            assert piece, f"the browser ended with {self._process.wait(10)}"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def running_browser(binary: str, profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile, ended with the block."""
    commands, outgoing = os.pipe()
    incoming, answers = os.pipe()
    line = [
        sys.executable,
        "-c",
        BECOME,
        str(commands),
        str(answers),
        binary,
        *FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
    ]
    process = subprocess.Popen(
        line,
        pass_fds=(commands, answers),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(answers)
    browser = Browser(process, incoming, outgoing)
    try:
        yield browser
    finally:
        browser.close()
