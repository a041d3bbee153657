"""A headless Chromium for a test, driven by the W3C WebDriver protocol; nothing but the system's packages is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INSTALLED = shutil.which("chromedriver") is not None and shutil.which("chromium") is not None
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1200,1000",
        ]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a function body returns in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, selector: str, keys: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": keys})

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def console(self) -> list[str]:
        """What was logged since the last time: errors of the page and of its policy."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def accessible(self) -> list[tuple[str, str, str]]:
        """Role, name and value of everything that a screen reader is told of."""
        tree = self._call("POST", "/goog/cdp/execute", {"cmd": "Accessibility.getFullAXTree", "params": {}})
        return [
            tuple(str(node.get(field, {}).get("value", "")) for field in ("role", "name", "value"))
            for node in tree["nodes"]
            if not node["ignored"]
        ]

    def close(self) -> None:
        self._call("DELETE", "", None)

    def _find(self, selector: str) -> str:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None


@contextmanager
def browser() -> Iterator[Browser]:
    """One that is closed afterwards, with its driver."""
    with tempfile.TemporaryFile("w+") as said:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=said, stderr=subprocess.STDOUT)
        try:
            opened = Browser(_port(said, driver))
            try:
                yield opened
            finally:
                opened.close()
        finally:
            driver.terminate()
            driver.wait(10)


def _port(said: Any, driver: subprocess.Popen[bytes]) -> int:
    """The one it chose, as it says."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and driver.poll() is None:
        said.seek(0)
        for line in said.read().splitlines():
            if "started successfully on port" in line:
                return int(line.rstrip(".").rsplit(" ", 1)[1])
        time.sleep(0.05)
    raise AssertionError("chromedriver did not start")
