"""Headless Chromium over its debugging pipe: opens pages, evaluates, clicks, types. Needs nothing but the browser."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]  # fmt: skip


class Browser:
    """Chromium and the DevTools protocol: JSON ended by NUL, to its descriptor 3 and from its descriptor 4."""

    def __init__(self, folder: Path) -> None:
        theirs_in, self.out = os.pipe()
        self.back, theirs_out = os.pipe()

        def as_three_and_four() -> None:
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
            for end, number in zip(ends, (3, 4)):
                os.dup2(end, number)

        self.process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=as_three_and_four, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.rest, self.events = 0, b"", []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self, seconds: float = 120) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.back], [], [], max(0, end - time.monotonic()))
            part = os.read(self.back, 1 << 20) if ready else b""
            assert part, "chromium ended or is silent"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.out)
            os.close(self.back)


class Tab:
    """An open page. `errors` holds every exception and blocked or refused thing of its console."""

    def __init__(self, browser: Browser, path: Path, hash: str = "", before: str = "", width: int = 1400) -> None:
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=path.as_uri() + hash)
        self.wait("document.body?.dataset.ready || document.body?.dataset.failed")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def js(self, code: str) -> Any:
        done = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, code: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.js(f"Boolean({code})"):
            assert time.monotonic() < end, f"still not true: {code}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({selector!r}).click()")

    def key(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38, "End": 35}.get(key, 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def drag(self, selector: str, start: float, end: float) -> None:
        box = self.js(
            f"(b => [b.left, b.top, b.width, b.height])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        places = [box[0] + share * box[2] for share in (start, (start + end) / 2, end)]
        for kind, x in zip(
            ("mousePressed", "mouseMoved", "mouseMoved", "mouseReleased"), (places[0], *places[1:], places[2])
        ):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=box[1] + box[3] / 2,
                button="left",
                buttons=1,
                clickCount=1,
            )

    def column(self, number: int) -> list[str]:
        """The words of a list column, of the rows in sight."""
        return self.js(
            f"[...document.querySelectorAll('.row .cell:nth-child({number})')].map(cell => cell.textContent)"
        )

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({selector!r})?.textContent ?? ''")

    def errors(self) -> list[str]:
        """Exceptions, console errors, and requests for anything but the page itself."""
        self.js("1")  # whatever was said before this answer has arrived
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent" and event["params"]["type"] != "Document":
                found.append(event["params"]["request"]["url"])
        return found

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
