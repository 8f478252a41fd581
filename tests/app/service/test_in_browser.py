"""A person's way through the pages, in a real headless Chromium: sign in, drop files, watch, look, delete."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
PASSWORD = "correct horse battery"
SECONDS = 900


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium that records every request."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    downloads = tmp_path_factory.mktemp("downloads")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.set_script_timeout(600)
    started.set_page_load_timeout(600)
    started.downloads = downloads
    started.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    yield started
    started.quit()


def wait(true: Callable[[], Any]) -> Any:
    """Wait until something is true; an element may not be there yet, or no longer."""
    until, found = time.monotonic() + SECONDS, None
    while not found:
        assert time.monotonic() < until
        time.sleep(0.2)
        with contextlib.suppress(Exception):
            found = true()
    return found


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def show(browser: Any, width: int, *, dark: bool) -> None:
    size = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def look(browser: Any, name: str, folder: Path) -> None:
    """Check a page with axe and for overflow, on a desk and a phone, light and dark; take pictures."""
    from axe_core_python.selenium import Axe  # type: ignore[import-untyped]

    for width, dark in ((1200, False), (360, True)):
        show(browser, width, dark=dark)
        # axe is put into the page by the driver, which its policy does not stop.
        found = Axe().run(browser)["violations"]
        serious = [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in found]
        assert serious == [], (name, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (name, width)
        browser.save_screenshot(str(folder / f"{name}-{width}.png"))
    show(browser, 1200, dark=False)


def problems(browser: Any) -> list[str]:
    """Messages of the console, other than of requests that were refused on purpose."""
    return [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"]


def hosts(browser: Any) -> set[str]:
    """Hosts that were asked for anything."""
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if url.startswith(("http:", "https:", "ws:")):
                asked.add(url.split("/")[2])
    return asked


def test_a_user_signs_in_uploads_four_files_and_views_downloads_and_deletes_the_result(
    browser: Any, start_server: Callable[..., Any], phantoms: Path, predicted: Callable[[Path], bytes], tmp_path: Path
) -> None:
    server = start_server()
    case = sorted(phantoms.iterdir())[0]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    show(browser, 1200, dark=False)

    browser.get(f"{server.url}/")
    assert browser.current_url.endswith("/sign-in")
    look(browser, "sign-in", pictures)
    one(browser, "#name").send_keys("ann")
    one(browser, "#password").send_keys(PASSWORD)
    one(browser, "#password").submit()
    wait(lambda: browser.current_url.endswith("/jobs"))
    look(browser, "jobs-empty", pictures)

    paths = [str(path) for path in sorted(case.glob("*.nii.gz")) if "seg" not in path.name]
    one(browser, "#files").send_keys("\n".join(paths))
    wait(lambda: one(browser, "#recognised").is_displayed())
    shown = one(browser, "#recognised").text
    assert case.name in shown
    assert all(f"{contrast}: " in shown for contrast in ("t1", "t1c", "t2", "flair"))
    look(browser, "recognised", pictures)
    one(browser, "#start").click()
    row = wait(lambda: one(browser, "#jobs tr[data-job]"))
    job = row.get_attribute("data-job")
    wait(lambda: one(browser, "#jobs .state").text == "done")  # without loading the page again
    look(browser, "jobs", pictures)

    one(browser, f'a[href="/jobs/{job}"]').click()
    wait(lambda: one(browser, "#volumes"))
    look(browser, "job", pictures)
    one(browser, f'a[href="/jobs/{job}/results/label_map"]').click()
    label_map = browser.downloads / f"{case.name}.nii.gz"
    wait(lambda: label_map.is_file() and label_map.stat().st_size)
    assert label_map.read_bytes() == predicted(case)

    browser.get(f"{server.url}/jobs/{job}/view")
    wait(lambda: one(browser, "#viewer").get_attribute("data-ready") == "true")
    look(browser, "viewer", pictures)

    browser.get(f"{server.url}/jobs/{job}")
    one(browser, "details summary").click()
    one(browser, f'form[action="/jobs/{job}/delete"] button').click()
    wait(lambda: one(browser, "#none"))
    assert list((server.folder / "jobs").iterdir()) == list((server.folder / "uploads").iterdir()) == []
    one(browser, 'form[action="/sign-out"] button').click()
    wait(lambda: browser.current_url.endswith("/sign-in"))
    assert problems(browser) == []
    assert hosts(browser) == {server.url.removeprefix("http://")}


def test_the_page_asks_for_an_unrecognised_contrast(
    browser: Any, start_server: Callable[..., Any], phantoms: Path, tmp_path: Path
) -> None:
    server = start_server()
    case = sorted(phantoms.iterdir())[1]
    paths = [path for path in sorted(case.glob("*.nii.gz")) if "seg" not in path.name]
    odd = shutil.copy(next(path for path in paths if path.name.endswith("_t2.nii.gz")), tmp_path / "series7.nii.gz")
    sent = [*(path for path in paths if not path.name.endswith("_t2.nii.gz")), Path(odd)]
    browser.get(f"{server.url}/sign-in")
    one(browser, "#name").send_keys("ann")
    one(browser, "#password").send_keys(PASSWORD)
    one(browser, "#password").submit()
    wait(lambda: one(browser, "#files")).send_keys("\n".join(map(str, sent)))
    wait(lambda: one(browser, "#assign").is_displayed())
    fields = browser.find_elements("css selector", "#assign select")
    fields[-1].send_keys("t2")
    one(browser, "#again").click()
    wait(lambda: "t2: series7.nii.gz" in one(browser, "#recognised").text)
    assert "missing" not in one(browser, "#recognised").text
    assert not one(browser, "#assign").is_displayed()
    one(browser, "#discard").click()
    wait(lambda: "Discarded" in one(browser, "#upload-status").text)
    assert problems(browser) == []
