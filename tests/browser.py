"""A real headless Chromium: what it draws, what its console says, and what it asks the network for."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)

_END = "end of the log"


class Browser:
    """One Chromium for many pages.

    Args:
        driver: The session.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file at a window size, after what earlier pages left in the logs is gone."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", features=scheme)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)
        self._driver.get("about:blank")
        self.console()
        self.requests()
        self._driver.get(path.as_uri())

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a DevTools command."""
        return self._driver.execute_cdp_cmd(name, parameters)

    def value(self, script: str) -> Any:
        """Return what a JavaScript expression is on the page."""
        return self._driver.execute_script(f"return {script}")

    def console(self) -> list[str]:
        """Return what the console has said since the last call."""
        # Logs arrive when they like: what the page said has come once this has.
        self.value(f"console.info('{_END}')")
        messages: list[str] = []
        while not messages or _END not in messages[-1]:
            messages += [entry["message"] for entry in self._driver.get_log("browser")]
        return messages[:-1]

    def requests(self) -> list[str]:
        """Return the addresses asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Give a browser; without Chromium on the machine the test fails."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail(
            "the report's tests need Chromium and its driver: `make test` installs them with apt-get; elsewhere "
            "install the packages that bring the commands `chromium` and `chromedriver`"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        started = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield Browser(started)
        finally:
            started.quit()
