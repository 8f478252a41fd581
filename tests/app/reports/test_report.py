"""``znormseg report``: what it recognises, what the pages say, that they escape data and load nothing external."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.errors import ConfigError, RunError
from app.html.distribution import distribution_svg
from app.html.templates import policy
from app.html.volume import MOST_BYTES, ViewerCase, grid_for, viewer_data
from app.reports.cohort import CohortPages, write_cohort
from app.reports.predictions import Predicted, find_predictions
from app.reports.report import recognise, report
from app.reports.run import best_validation, render_run
from data.datasets.export import export_dataset
from data.datasets.layouts import find_cases
from data.datasets.source import DataSource
from data.errors import DataError

HOSTILE = "<img src=x onerror=alert('1')>&"
SCRIPT = "</script><script>alert(1)</script>"
VOID = frozenset({"meta", "img", "path", "input", "circle", "br"})


class Outline(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.seen if name == tag]


def predictions_of(data: Path, folder: Path, *, ids: tuple[str, ...] = (), **more: Any) -> Path:
    """As ``predict`` would write them: each phantom's own label map, moved by a voxel."""
    folder.mkdir()
    for number, case in enumerate(find_cases(data)[: len(ids) or 2]):
        name = ids[number] if ids else case.id
        assert case.label is not None
        image = nib.Nifti1Image.from_filename(case.label)
        voxels = np.roll(np.asarray(image.dataobj), 1, axis=0)
        nib.save(nib.Nifti1Image(voxels.astype(np.uint8), image.affine), folder / f"{name}.nii.gz")
        record = {
            "case": name,
            "label_map": str(folder / f"{name}.nii.gz"),
            "volumes_ml": {"WT": 10.0 * (number + 1), "TC": 4.0, "ET": 2.0},
            "labels": {"convention": "brats2021", "necrosis": 1, "oedema": 2, "enhancing": 4},
            "inputs": {contrast: str(path) for contrast, path in case.contrasts.items()},
            "weights_sha256": "abc123",
            "versions": {"torch": SCRIPT},
            "flags": [{"code": "tiny", "sentence": f"Little of it {SCRIPT}"}] if number == 0 else [],
            **more,
        }
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def predictions(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two predicted phantoms, one of a hostile name; tests read them and leave them as they are."""
    ids = (find_cases(phantoms)[0].id, HOSTILE)
    return predictions_of(phantoms, tmp_path_factory.mktemp("pred") / "out", ids=ids)


@pytest.fixture(scope="module")
def pages(predictions: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> CohortPages:
    """Their pages with references; tests read them and leave them as they are."""
    return write_cohort(predictions, tmp_path_factory.mktemp("report") / "new", references=DataSource(phantoms))


def texts(pages: CohortPages) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in (pages.index, *pages.cases.values())]


def viewer_of(page: Path) -> Any:
    found = re.search(r'id="viewer-data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


# Predictions


def test_every_element_of_every_page_is_closed_in_order(pages: CohortPages) -> None:
    assert [Outline(text).open for text in texts(pages)] == [[], [], []]


def test_the_report_references_nothing_external(pages: CohortPages) -> None:
    for path in (pages.index, *pages.cases.values()):
        seen = Outline(path.read_text(encoding="utf-8")).seen
        links = [attrs[key] or "" for _, attrs in seen for key in ("src", "href") if key in attrs]
        assert all(link.startswith(("data:image/", "cases/", "../index.html", "Bra", "%3C")) for link in links)
        assert not re.search(r"https?://|url\(|@import", path.read_text(encoding="utf-8"))


def test_every_link_leads_to_a_page(pages: CohortPages) -> None:
    from urllib.parse import unquote

    for path in (pages.index, *pages.cases.values()):
        targets = [link["href"] for link in Outline(path.read_text(encoding="utf-8")).of("a")]
        assert targets
        assert all((path.parent / unquote(target or "")).is_file() for target in targets)


def test_malicious_names_and_values_are_escaped(pages: CohortPages) -> None:
    for text in texts(pages):
        outline = Outline(text)
        assert not [attrs for _, attrs in outline.seen if any(key.startswith("on") for key in attrs)]
        assert "<script>alert" not in text
        assert len([one for one in outline.of("script") if one.get("type") is None]) == 1


def test_the_content_security_policy_allows_only_the_script_of_the_page(pages: CohortPages) -> None:
    for text in texts(pages):
        script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
        told = [meta["content"] for meta in Outline(text).of("meta") if "http-equiv" in meta]
        assert told == [policy(script)]


def test_every_page_says_it_is_for_research_only(pages: CohortPages) -> None:
    assert [text.count("Research use only; not a medical device.") for text in texts(pages)] == [2, 2, 2]


def test_rows_are_sorted_by_the_exact_numbers(pages: CohortPages) -> None:
    cells = Outline(pages.index.read_text(encoding="utf-8")).of("td")
    keys = [cell["data-key"] for cell in cells if "data-key" in cell]
    assert {"10.0", "20.0"} <= set(keys)
    assert any(len(key or "") > 8 for key in keys)  # Dice, in full precision


def test_column_headers_are_buttons_with_a_scope(pages: CohortPages) -> None:
    text = pages.index.read_text(encoding="utf-8")
    heads = re.findall(r'<th scope="col"[^>]* data-kind="(\w+)"[^>]*><button type="button">([^<]+)</button>', text)
    assert [name for _, name in heads] == [
        *("Case", "WT Dice", "TC Dice", "ET Dice", "WT ml", "TC ml", "ET ml", "Flags")
    ]
    assert 'aria-sort="ascending"' in text


def test_flags_are_in_the_table_and_on_the_case_page(pages: CohortPages) -> None:
    index, of_hostile, of_flagged = texts(pages)
    assert index.count('<span class="flag">tiny</span>') == 1
    assert "Little of it" in of_flagged
    assert "Little of it" not in of_hostile


def test_the_picture_has_a_text_alternative(pages: CohortPages) -> None:
    alt = [image["alt"] or "" for image in Outline(texts(pages)[2]).of("img")]
    assert len(alt) == 1
    assert "reference outlines on the left" in alt[0]
    assert "Dice WT 0." in alt[0]


def test_the_viewer_opens_at_the_predicted_tumour(pages: CohortPages) -> None:
    import base64
    import io

    from PIL import Image

    data = viewer_of(next(iter(pages.cases.values())))
    with Image.open(io.BytesIO(base64.b64decode(data["labels"].partition(",")[2]))) as picture:
        labels = np.asarray(picture) // 16
    (x, y, z), (width, height, _) = data["start"], data["shape"]
    row, column = divmod(z, data["columns"])
    assert labels[row * height + y, column * width + x] % 4 != 0
    assert set(data["images"]) == {"T1c", "FLAIR"}


def test_missing_scans_are_reported_and_the_page_is_still_written(phantoms: Path, tmp_path: Path) -> None:
    folder = predictions_of(phantoms, tmp_path / "p", inputs={"t1c": "/nowhere/<b>.nii.gz"})
    page = next(iter(write_cohort(folder, tmp_path / "out").cases.values())).read_text(encoding="utf-8")
    assert "No longer at the paths recorded by the prediction: T1c. Give --images DATA to show them." in page
    assert "There is no scan to show." in page


def test_images_from_another_folder_are_shown(phantoms: Path, tmp_path: Path) -> None:
    folder = predictions_of(phantoms, tmp_path / "p", inputs={})
    made = write_cohort(folder, tmp_path / "out", images=DataSource(phantoms))
    assert all("viewer-data" in page.read_text(encoding="utf-8") for page in made.cases.values())


def test_references_with_ambiguous_label_numbers_are_scored_with_labels(
    phantoms: Path, tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    case = find_cases(phantoms)[0]
    assert case.label is not None
    folder = predictions_of(phantoms, tmp_path / "p", ids=("patient1",))
    image = nib.Nifti1Image.from_filename(case.label)
    voxels = np.asarray(image.dataobj).astype(np.uint8)
    voxels[voxels == 4] = 3
    (tmp_path / "refs" / "patient1").mkdir(parents=True)
    nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / "refs" / "patient1" / "patient1_seg.nii.gz")
    asked = ("report", folder, tmp_path / "out", "--references", tmp_path / "refs")
    refused = znormseg(*asked)
    assert (refused.code, "give the right convention with --labels" in refused.err) == (3, True)
    assert znormseg(*asked, "--labels", "brats2023").code == 0
    dice = re.findall(r"ET (0\.\d+)", (tmp_path / "out" / "cases" / "patient1.html").read_text(encoding="utf-8"))
    assert dice
    assert float(dice[0]) > 0.5


def test_volumes_of_a_4d_file_are_shown(phantoms: Path, tmp_path: Path) -> None:
    case = find_cases(export_dataset(DataSource(phantoms), tmp_path / "msd", "msd").out)[0]
    assert case.volumes["t1c"] != case.volumes["flair"]
    inputs = {contrast: str(path) for contrast, path in case.contrasts.items()}
    told = {"inputs": inputs, "input_volumes": case.volumes}
    folder = predictions_of(phantoms, tmp_path / "p", ids=(case.id,), **told)
    images = viewer_of(write_cohort(folder, tmp_path / "out").cases[case.id])["images"]
    assert set(images) == {"T1c", "FLAIR"}
    assert images["T1c"] != images["FLAIR"]


def test_a_scan_on_another_grid_is_left_out_with_the_reason(phantoms: Path, tmp_path: Path) -> None:
    case = find_cases(phantoms)[0]
    image = nib.Nifti1Image.from_filename(case.contrasts["flair"])
    moved = image.affine + np.diag([0, 0, 0, 0])
    moved[0, 3] += 30
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), tmp_path / "moved.nii.gz")
    inputs = {"t1c": str(case.contrasts["t1c"]), "flair": str(tmp_path / "moved.nii.gz")}
    folder = predictions_of(phantoms, tmp_path / "p", ids=(case.id,), inputs=inputs)
    made = write_cohort(folder, tmp_path / "out")
    assert "FLAIR is not shown, as it is on a different grid" in made.cases[case.id].read_text(encoding="utf-8")
    assert set(viewer_of(made.cases[case.id])["images"]) == {"T1c"}


@pytest.mark.parametrize("volumes", [None, 3])
def test_uncertainty_next_to_the_label_map_is_in_the_viewer(
    volumes: int | None, phantoms: Path, tmp_path: Path
) -> None:
    case = find_cases(phantoms)[0]
    folder = predictions_of(phantoms, tmp_path / "p", ids=(case.id,))
    label_map = nib.Nifti1Image.from_filename(folder / f"{case.id}.nii.gz")
    shape = label_map.shape if volumes is None else (*label_map.shape, volumes)
    unsure = np.linspace(0, 0.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    nib.save(nib.Nifti1Image(unsure, label_map.affine), folder / f"{case.id}_uncertainty.nii.gz")
    made = write_cohort(folder, tmp_path / "out")
    assert list(made.cases) == [case.id]
    data = viewer_of(made.cases[case.id])
    assert data["uncertainty"].startswith("data:image/webp")
    assert 0.1 < data["uncertainty_top"] <= 0.5


def test_a_case_that_cannot_be_read_does_not_stop_the_others(phantoms: Path, tmp_path: Path) -> None:
    folder = predictions_of(phantoms, tmp_path / "p")
    ids = sorted(path.stem for path in folder.glob("*.json"))
    (folder / f"{ids[0]}.json").write_text('{"volumes_ml"')
    made = write_cohort(folder, tmp_path / "out")
    assert (list(made.cases), list(made.failures)) == ([ids[1]], [ids[0]])
    assert "damaged" in made.index.read_text(encoding="utf-8")


def test_if_no_case_can_be_read_one_error_is_raised_and_no_index_written(phantoms: Path, tmp_path: Path) -> None:
    folder = predictions_of(phantoms, tmp_path / "p", labels={"convention": "mine"})
    with pytest.raises(DataError, match="no case can be shown"):
        write_cohort(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def predicted(**record: Any) -> Predicted:
    return Predicted(case="a", label_map=Path("a.nii.gz"), uncertainty=None, record=record)


def test_a_missing_contrast_is_flagged_even_if_the_json_has_no_flags() -> None:
    assert [flag.sentence for flag in predicted(missing_contrasts=["t1", "t2"]).flags] == ["Missing: t1, t2."]


def test_an_interval_is_preferred_to_a_range_over_predictions() -> None:
    ends = {"WT": [1.0, 3.0], "TC": [0.0, 1.0], "ET": None}
    one = predicted(volume_interval_ml=ends, volume_interval_level=0.9, answers={"volume_range_ml": {"WT": [7, 8]}})
    assert one.volume_intervals_ml == {"WT": (1.0, 3.0), "TC": (0.0, 1.0)}
    assert one.interval_name == "90% interval (ml)"


@pytest.mark.parametrize("record", [{"flags": "x"}, {"flags": [3]}, {"volumes_ml": 3}, {"confidence": {"WT": "high"}}])
def test_unexpected_json_is_ignored(record: dict[str, Any]) -> None:
    one = predicted(**record)
    assert (one.flags, one.confidence, set(one.volumes_ml.values())) == ((), {}, {None})


def test_unexpected_volume_values_are_ignored(phantoms: Path, tmp_path: Path) -> None:
    told = {"t1": -1, "t1c": True, "t2": "2", "flair": 3}
    found, _ = find_predictions(predictions_of(phantoms, tmp_path / "p", ids=("x",), input_volumes=told))
    assert found[0].volumes == {"flair": 3}


# Viewer data


def block(**changed: Any) -> ViewerCase:
    image = np.zeros((30, 30, 12), dtype=np.float32)
    image[4:26, 5:25, 2:10] = 100
    codes = np.zeros(image.shape, dtype=np.uint8)
    codes[8:16, 8:16, 4:8] = 2
    values: dict[str, Any] = {"images": {"T1c": image}, "prediction": codes, "reference": None, "uncertainty": None}
    return ViewerCase(**{**values, "spacing_mm": (1.0, 1.0, 2.0), **changed})


@pytest.mark.parametrize("grid_mm", [1.0, 2.0])
def test_viewer_volumes_are_cropped_with_cubic_voxels(grid_mm: float) -> None:
    assert viewer_data(block(), grid_mm=grid_mm)["shape"] == [22 / grid_mm, 20 / grid_mm, 16 / grid_mm]


def test_for_an_empty_prediction_the_viewer_opens_at_the_reference_or_the_centre() -> None:
    empty = np.zeros((30, 30, 12), dtype=np.uint8)
    spot = empty.copy()
    spot[20, 20, 5] = 3
    at_reference = viewer_data(block(prediction=empty, reference=spot), grid_mm=1.0)["start"]
    assert at_reference[:2] == [16, 15]
    assert viewer_data(block(prediction=empty), grid_mm=2.0)["start"] == [5, 5, 4]


def test_large_cohorts_get_coarser_grids() -> None:
    assert [grid_for(cases) for cases in (1, 100, 200, 10_000)] == [1.0, 1.5, 2.0, 2.0]
    assert MOST_BYTES < 40e6


# Runs


def test_the_page_of_a_run_lists_the_worst_cases_first(tiny_run: Path, tmp_path: Path) -> None:
    html = render_run(tiny_run)
    assert Outline(html).open == []
    best = best_validation([json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()])
    assert best is not None
    table = html[html.index("Worst cases first") : html.index("</table>")]
    shown = re.findall(r'<th scope="row">([^<]+)</th>', table)
    assert shown == sorted(best["cases"], key=lambda case: (sum(best["cases"][case].values()), case))
    for text in ("training.steps", "Learning curves", "weights, SHA-256", "znormseg train"):
        assert text.rpartition(".")[2] in html


def test_the_mean_over_cases_is_the_recorded_dice(tiny_run: Path) -> None:
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    for record in (one for one in records if one["kind"] == "validation"):
        for region, dice in record["dice"].items():
            assert np.mean([case[region] for case in record["cases"].values()]) == pytest.approx(dice, abs=1e-12)


def test_the_page_says_when_a_run_has_no_dice_by_case(tiny_run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_run, old, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", ".lock"))
    lines = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    (old / "metrics.jsonl").write_text("\n".join(json.dumps({**one, "cases": {}}) for one in lines))
    assert "Scores by case were not recorded" in render_run(old)


def test_non_finite_scores_are_left_out_of_a_distribution() -> None:
    svg = distribution_svg({"WT": [0.5, float("nan"), 0.7], "TC": [], "ET": [1.0]}, name="Dice")
    assert svg.count("<circle") == 3
    assert "WT median 0.600" in svg


# The command


def test_the_kind_of_a_folder_is_recognised_by_its_files(tiny_run: Path, predictions: Path, tmp_path: Path) -> None:
    assert [recognise(tiny_run), recognise(predictions)] == ["run", "predictions"]
    for name, kind in (("plan.json", "comparison"), ("folds.json", "cross-validation")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text("{}")
        assert recognise(tmp_path / kind) == kind


@pytest.mark.parametrize(
    ("place", "text"),
    [("nowhere", "does not exist"), ("file", "is a file"), ("empty", "contains nothing to report on")],
)
def test_a_folder_without_a_page_gives_one_error(
    place: str, text: str, tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    ended = znormseg("report", tmp_path / place, tmp_path / "out")
    assert (ended.code, ended.out) == (5, "")
    assert ended.err.count("\n") == 1
    assert text in ended.err
    assert not (tmp_path / "out").exists()


def test_references_of_a_run_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--references can only be used with predictions"):
        report(tiny_run, tmp_path / "out", references=DataSource(tmp_path))


def test_pages_are_not_written_into_the_folder_they_describe(tiny_run: Path) -> None:
    with pytest.raises(RunError, match="give another folder"):
        report(tiny_run, tiny_run)


def test_the_json_lists_what_was_written(tiny_run: Path, tmp_path: Path, znormseg: Callable[..., Any]) -> None:
    ended = znormseg("report", tiny_run, tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told == {"kind": "run", "page": str(tmp_path / "out" / "index.html"), "cases": {}, "failures": {}}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]


@pytest.mark.parametrize(("name", "told"), [("plan.json", "comparison"), ("folds.json", "cross-validation")])
def test_a_damaged_folder_gives_one_error(name: str, told: str, tmp_path: Path, znormseg: Callable[..., Any]) -> None:
    (tmp_path / "what").mkdir()
    (tmp_path / "what" / name).write_text("{}")
    ended = znormseg("report", tmp_path / "what", tmp_path / "out")
    assert ended.code == 5, ended.err
    assert f"{name}: damaged" in ended.err
    assert not (tmp_path / "out").exists()
