"""A headless Chromium, driven over a pipe by the DevTools protocol; needs no library."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
"""The browser of this machine, if it has one."""


class Browser:
    """One page. A context manager, so that the process always ends."""

    def __init__(self, folder: Path) -> None:
        """Start the browser.

        Args:
            folder: for its profile and for what it downloads.
        """
        assert CHROMIUM is not None
        self.errors: list[str] = []
        """What scripts and the content security policy complained of."""
        self._ids = itertools.count(1)
        self._events: list[dict[str, Any]] = []
        to_read, self._to_browser = os.pipe()
        self._from_browser, to_write = os.pipe()
        options = [
            "--headless=new", "--hide-scrollbars", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder / 'profile'}",
        ]  # fmt: skip
        # Chromium reads commands from descriptor 3 and writes answers to 4, nowhere else. Copied
        # out of the way first, as the pipes may themselves have these numbers.
        script = f'exec 8<&{to_read} 9>&{to_write}; exec 3<&8 4>&9; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", CHROMIUM, *options, "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._answers = os.fdopen(self._from_browser, "rb")
        self._buffer = b""
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder),
                  eventsEnabled=True)  # fmt: skip

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        self._answers.close()
        os.close(self._to_browser)

    def open(self, page: Path | str, *, width: int = 1280, dark: bool = False) -> None:
        """Open a file or an address, as a window of that width, and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self._events.clear()
        address = page.absolute().as_uri() if isinstance(page, Path) else page
        self.call("Page.navigate", url=address)
        self.wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, **clip: float) -> None:
        """A picture of the page, or of the part x, y, width and height of it."""
        options = {"clip": {**clip, "scale": 1}} if clip else {}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, **options)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def wait(self, method: str, **expected: Any) -> dict[str, Any]:
        """The next event of that name whose parameters have these values."""
        while True:
            event = self._events.pop(0) if self._events else self._read()
            params: dict[str, Any] = event.get("params", {})
            if event.get("method") == method and expected.items() <= params.items():
                return params

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = self._answers.read1(1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
            if message["method"] == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]))
            if message["method"] == "Log.entryAdded":
                self.errors.append(message["params"]["entry"]["text"])
        return message


@dataclass(frozen=True, slots=True)
class Page:
    """The web page of the service in a browser, as a reader uses it."""

    browser: Browser
    address: str
    """With the slash at its end."""
    token: str

    def open(self, place: str, **options: Any) -> None:
        """Load the page anew, logged in, at an address below it."""
        self.browser.open("about:blank")
        self.browser.open(f"{self.address}#token={self.token}", **options)
        self.wait("document.querySelector('#query')")
        self.go(place)

    def go(self, place: str) -> None:
        self.browser.run(f"location.hash = {json.dumps(place)}")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.browser.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition}: {self.text()} {self.browser.errors}"
            time.sleep(0.02)

    def text(self, selector: str = "main") -> str:
        return str(self.browser.run(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def click(self, name: str, selector: str = "button") -> None:
        """Click the control of that text."""
        found = f"""[...document.querySelectorAll({selector!r})]
            .find((control) => (control.ariaLabel ?? control.innerText).trim() === {name!r})"""
        self.wait(found)
        self.browser.run(f"(() => {{ const one = {found}; one.focus(); one.click(); }})()")

    def fill(self, selector: str, value: str) -> None:
        """Give a control a value, as by hand."""
        self.browser.run(f"""(() => {{
            const control = document.querySelector({selector!r});
            control.value = {json.dumps(value)};
            for (const name of ["input", "change"]) control.dispatchEvent(new Event(name));
        }})()""")

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                              windowsVirtualKeyCode=code, modifiers=modifiers)  # fmt: skip

    def focused(self) -> str:
        """Tag or id of the element that has the focus."""
        return str(self.browser.run("document.activeElement.id || document.activeElement.tagName"))
