"""A headless Chromium driven over its own DevTools pipe: no driver, no package."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

BINARY = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if path), None)


class Browser:
    """One page. `evaluate` returns what JavaScript does; the rest is what hands do."""

    def __init__(self, write_fd: int, read_fd: int):
        self._write, self._read, self._number, self._rest, self._session = write_fd, read_fd, 0, b"", None

    def command(self, method: str, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], 60)[0]:
                raise TimeoutError("the browser said nothing for a minute")
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("the browser has gone")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path, downloads: Path):
        self.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._load("Page.navigate", url=page.as_uri())

    def reload(self):
        self._load("Page.reload")

    def _load(self, method: str, **parameters):
        """Load a page and wait until it is there and no longer the one before."""
        self.evaluate("window.before = true")
        self.command(method, **parameters)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError):  # between two pages there is nothing to ask
                if self.evaluate("!window.before && document.readyState === 'complete'"):
                    return
            time.sleep(0.05)
        raise TimeoutError(f"no page a minute after {method}")

    def evaluate(self, expression: str):
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def click(self, selector: str):
        """A real mouse click in the middle of the element."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView();"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, text: str):
        self.command("Input.insertText", text=text)

    def press(self, key: str):
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, key=key)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile, gone at the end."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
    # Chromium takes commands on descriptor 3 and answers on 4.
    line = f'exec "{BINARY}" {flags} "--user-data-dir={profile}" 3<&{to_read} 4>&{from_write}'
    process = subprocess.Popen(
        ["bash", "-c", line], pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Browser(to_write, from_read)
    finally:
        process.kill()
        process.wait()
        os.close(to_write)
        os.close(from_read)
