"""A headless Chromium over its debugging pipe: what a page says, how wide it is, what it looks like."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """An open page.

    Attributes:
        messages: what it wrote to the console, and errors and violations that the browser logged.
        requests: addresses that it asked for, its own excluded.
    """

    def __init__(self, browser: "_Pipe", session: str) -> None:
        self._browser, self._session = browser, session
        self.messages: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol, and its result."""
        number = self._browser.write(method, parameters, self._session)
        while True:
            answer = self._browser.read()
            self._note(answer)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, width: int, dark: bool = False, height: int = 900, scale: float = 1) -> None:
        """Load a file and wait until its charts are drawn."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.size(width, height, scale)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        drawn = "document.readyState === 'complete' && document.documentElement.dataset.charts !== undefined"
        wait = f"const timer = setInterval(() => {{ if ({drawn}) {{ clearInterval(timer); done() }} }}, 50)"
        self.evaluate(f"new Promise(done => {{ {wait} }})")

    def size(self, width: int, height: int = 900, scale: float = 1) -> None:
        """Give the window a size in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def evaluate(self, expression: str) -> Any:
        """The value of an expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The window as PNG or WebP, by the name of the file."""
        kind = path.suffix[1:]
        more = {"quality": 80} if kind == "webp" else {}
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format=kind, **more)["data"]))

    def _note(self, event: dict[str, Any]) -> None:
        method, given = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(part.get("value", part.get("description"))) for part in given["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(given["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent" and given["type"] != "Document":
            address = given["request"]["url"]
            if not address.startswith("data:"):
                self.requests.append(address)


class _Pipe:
    def __init__(self, reading: int, writing: int) -> None:
        self._in, self._out = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
        self._last = 0

    def write(self, method: str, parameters: dict[str, Any], session: str | None = None) -> int:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        self._out.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        self._out.flush()
        return self._last

    def read(self) -> dict[str, Any]:
        message = b""
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return json.loads(message)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self.write(method, parameters)
        while (answer := self.read()).get("id") != number:
            pass
        return answer["result"]

    def close(self) -> None:
        self._in.close()
        self._out.close()


@contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """A page of a browser that ends with the context.

    Args:
        profile: an empty folder for what the browser keeps.
    """
    assert CHROMIUM is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
               "--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe")  # fmt: skip
    # The browser reads commands from descriptor 3 and answers on 4.
    start = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", start, CHROMIUM, *options, "about:blank"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    pipe = _Pipe(ours_in, ours_out)
    try:
        target = pipe.ask("Target.createTarget", url="about:blank")["targetId"]
        yield Page(pipe, pipe.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
    finally:
        process.kill()
        process.wait()
        pipe.close()
