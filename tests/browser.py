"""Opens pages in a headless Chromium. `conftest.py` has the fixture `browser`."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


@dataclasses.dataclass
class Browser:
    """A running Chromium with one tab; `driver` is Selenium's WebDriver."""

    driver: object

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False):
        """Opens a file in a viewport of CSS pixels, in the light or dark scheme, and returns the driver."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")  # otherwise a path that differs in its hash alone is not loaded again
        self.driver.get(path.absolute().as_uri() if isinstance(path, Path) else path)
        return self.driver

    def problems(self) -> list[str]:
        """Returns the errors in the console, and the addresses requested from the network, since the last call."""
        errors = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return errors + [url for url in urls if url.startswith(("http", "ws"))]


def start(folder: Path) -> Browser:
    """Starts a browser with an empty profile in a new folder. Skips the test if a program is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))  # Selenium downloads none
    driver.set_page_load_timeout(60)
    return Browser(driver)
