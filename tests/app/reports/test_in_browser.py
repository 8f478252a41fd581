"""The pages of ``znormseg report``, opened from their files in a real browser without network."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.reports.cohort import CohortPages, write_cohort
from app.reports.report import report
from data.datasets.layouts import find_cases
from data.datasets.source import DataSource
from data.phantoms import write_phantoms

pytestmark = pytest.mark.slow

HOSTILE = "<script>document.title='owned'<"
COHORT = 200
MOST_SECONDS = 3.0
MOST_BYTES = 40_000_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium without network."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    started.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantoms at 2 mm."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 2, spacing_mm=2.0)
    return folder


def cohort_of(data: Path, folder: Path, count: int, *, hostile: bool = False) -> tuple[Path, Path]:
    """Predictions and data of ``count`` cases: the phantoms over and over, as links, predicted two voxels aside."""
    found = find_cases(data)
    (folder / "predictions").mkdir(parents=True)
    for number in range(count):
        case, first = found[number % len(found)], number < len(found)
        name = HOSTILE if hostile and number == 0 else f"BraTS2021_{number:05}"
        label_map = folder / "predictions" / f"{name}.nii.gz"
        if hostile or first:
            assert case.label is not None
            image = nib.Nifti1Image.from_filename(case.label)
            voxels = np.roll(np.asarray(image.dataobj), 2, axis=0).astype(np.uint8)
            nib.save(nib.Nifti1Image(voxels, image.affine), label_map)
        else:
            os.link(folder / "predictions" / f"BraTS2021_{number % len(found):05}.nii.gz", label_map)
        record = {
            "volumes_ml": {"WT": 1.0 + 7 * number % 50, "TC": 0.5, "ET": 0.25},
            "labels": {"convention": "brats2021"},
            "inputs": {contrast: str(path) for contrast, path in case.contrasts.items()},
            "flags": [{"code": "tiny", "sentence": f"{HOSTILE}/script>"}] if number % 3 == 0 else [],
            "versions": {"znormseg": HOSTILE},
        }
        label_map.with_name(f"{name}.json").write_text(json.dumps(record))
        if case.label is not None and not hostile:
            place = folder / "references" / f"{name}_seg.nii.gz"
            place.parent.mkdir(exist_ok=True)
            os.link(case.label, place)
    return folder / "predictions", folder / "references"


@pytest.fixture(scope="module")
def pages(data: Path, tmp_path_factory: pytest.TempPathFactory) -> CohortPages:
    folder = tmp_path_factory.mktemp("cohort")
    predictions, references = cohort_of(data, folder, 2)
    return write_cohort(predictions, folder / "report", references=DataSource(references))


@pytest.fixture(scope="module")
def hostile_pages(data: Path, tmp_path_factory: pytest.TempPathFactory) -> CohortPages:
    folder = tmp_path_factory.mktemp("hostile")
    predictions, _ = cohort_of(data, folder, 2, hostile=True)
    return write_cohort(predictions, folder / "report")


def show(browser: Any, page: Path, *, width: int = 1200, dark: bool = False) -> None:
    """Open a page and wait for its viewer, where it has one."""
    size = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get_log("browser")
    browser.get(page.resolve().as_uri())
    for _ in range(200):
        if browser.execute_script("const v = document.getElementById('viewer'); return !v || v.dataset.ready"):
            return
        time.sleep(0.1)
    raise AssertionError(f"the viewer of {page} does not get ready: {browser.get_log('browser')}")


def serious_faults(browser: Any) -> list[str]:
    script = resources.files(pytest.importorskip("axe_core_python")).joinpath("axe.min.js").read_text("utf-8")
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": script})
    found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    return [
        f"{fault['id']}: {fault['nodes'][0]['html'][:200]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]


def pixels(browser: Any, plane: str) -> tuple[Any, int, int]:
    """What the screen shows of a plane, and where the crosshair is in it."""
    from PIL import Image

    canvas = browser.find_element("css selector", f"canvas[data-plane={plane}]")
    picture = np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB")).astype(int)
    scale = picture.shape[1] / int(canvas.get_attribute("width"))
    x, y = (round(float(canvas.get_attribute(f"data-{axis}")) * scale) for axis in "xy")
    return picture, y, x


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (400, False), (400, True)])
def test_pages_have_no_serious_axe_violation_and_no_console_error(
    browser: Any, pages: CohortPages, width: int, dark: bool
) -> None:
    for page in (pages.index, next(iter(pages.cases.values()))):
        show(browser, page, width=width, dark=dark)
        assert serious_faults(browser) == []
        assert browser.get_log("browser") == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_page_of_a_run_has_no_violation_either(browser: Any, tiny_run: Path, tmp_path: Path) -> None:
    show(browser, report(tiny_run, tmp_path / "out").page)
    assert serious_faults(browser) == []
    assert browser.get_log("browser") == []


def test_pages_of_several_runs_have_no_violation_either(
    browser: Any, phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    from app.config.load import load_config
    from app.experiments.comparison.compare import compare
    from app.experiments.comparison.plan import plan_comparison
    from app.experiments.crossval.run import cross_validate

    own = ("training.steps", "training.learning_rate")
    settings = [one for one in tiny_settings if not one.startswith(own)]
    plan = plan_comparison(arms=["clip", "znorm"], overrides=settings, seeds=1, steps=4, rates=["1e-3,1e-2"])
    compare(DataSource(phantoms), tmp_path / "comparison", plan)
    cross_validate(DataSource(phantoms), tmp_path / "folds", load_config("laptop", tiny_settings), folds=2)
    for name in ("comparison", "folds"):
        show(browser, report(tmp_path / name, tmp_path / f"pages of {name}").page)
        assert serious_faults(browser) == []
        assert browser.get_log("browser") == []


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_the_viewer_shows_the_overlay_at_the_lesion(browser: Any, pages: CohortPages, plane: str) -> None:
    colours = {"necrotic core": (240, 228, 66), "oedema": (86, 180, 233), "enhancing tumour": (255, 77, 77)}
    for page in pages.cases.values():
        show(browser, page)
        browser.execute_script(
            "const o = document.querySelector('[data-control=opacity]'); o.value = 100;"
            "o.dispatchEvent(new Event('input'))"
        )
        said = browser.find_element("css selector", "#viewer output").text
        tissue = said.removeprefix("At the crosshair: prediction ").partition(",")[0]
        picture, row, column = pixels(browser, plane)
        assert np.abs(picture[row, column] - colours[tissue]).max() <= 3
        assert picture[2, 2].max() < 80  # the corner is outside of the brain


def test_without_the_prediction_the_scan_is_grey_at_the_lesion(browser: Any, pages: CohortPages) -> None:
    show(browser, next(iter(pages.cases.values())))
    for control in ("prediction", "reference"):
        browser.find_element("css selector", f"[data-control={control}]").click()
    picture, row, column = pixels(browser, "axial")
    assert np.ptp(picture[row, column]) <= 2


def test_sliders_move_the_crosshair_with_the_keyboard(browser: Any, pages: CohortPages) -> None:
    show(browser, next(iter(pages.cases.values())))
    slider = browser.find_element("css selector", "[data-control=axial]")
    before = int(slider.get_attribute("value"))
    slider.send_keys("\ue014")  # arrow to the right
    assert int(slider.get_attribute("value")) == before + 1
    label = browser.find_element("css selector", "canvas[data-plane=axial]").get_attribute("aria-label")
    assert label.startswith(f"axial slice {before + 2} of ")


def test_a_script_in_a_patient_name_is_shown_as_text(browser: Any, hostile_pages: CohortPages) -> None:
    for page in (hostile_pages.index, hostile_pages.cases[HOSTILE]):
        show(browser, page)
        assert browser.title != "owned"
        assert HOSTILE in browser.find_element("css selector", "body").text
        assert browser.get_log("browser") == []


def test_a_link_with_a_malicious_name_leads_to_its_page(browser: Any, hostile_pages: CohortPages) -> None:
    show(browser, hostile_pages.index)
    browser.find_element("link text", HOSTILE).click()
    assert browser.find_element("css selector", "h1").text == HOSTILE


def test_a_report_of_two_hundred_cases_is_small_opens_quickly_sorts_and_filters(
    browser: Any, data: Path, tmp_path: Path
) -> None:
    predictions, references = cohort_of(data, tmp_path, COHORT)
    made = write_cohort(predictions, tmp_path / "report", references=DataSource(references))
    total = sum(path.stat().st_size for path in (tmp_path / "report").rglob("*.html"))
    assert len(made.cases) == COHORT
    assert total < MOST_BYTES, f"{total} bytes"
    show(browser, made.index)
    timing = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < timing < 1000 * MOST_SECONDS, f"{timing:.0f} ms"

    def shown() -> list[float]:
        rows = browser.find_elements("css selector", "tbody tr:not([hidden])")
        return [float(row.find_elements("css selector", "td")[4].get_attribute("data-key")) for row in rows]

    head = browser.find_element("xpath", "//th[button='WT ml']")
    head.find_element("css selector", "button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert shown() == sorted(shown(), reverse=True)
    head.find_element("css selector", "button").click()
    assert shown() == sorted(shown())
    browser.find_element("css selector", "[data-filter=text]").send_keys("_0019")
    status = browser.find_element("css selector", "[data-status]").text
    assert (len(shown()), status) == (10, f"10 of {COHORT} cases shown.")


def test_the_page_fits_on_paper(browser: Any, pages: CohortPages) -> None:
    show(browser, next(iter(pages.cases.values())))
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert base64.b64decode(printed).startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.find_element("css selector", "#viewer").is_displayed()
    assert browser.find_element("css selector", "figure.overlay img").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
