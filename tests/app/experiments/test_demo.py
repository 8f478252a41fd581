"""The demo: it writes everything it promises, and leaves folders with other content as they are."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from app.errors import RunError
from app.experiments.demo import DemoResult, run_demo
from app.progress import Progress
from app.reports.demo import write_demo_page
from data.datasets.layouts import find_cases, find_label_cases


@pytest.fixture(scope="session")
def demo(tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """A demo of three phantoms that train, one that validates and one that is held out."""
    # At the demo's 2 mm a window of 16 voxels would be laid a thousand times.
    outcome = run_demo(
        tmp_path_factory.mktemp("demo"),
        overrides=[*tiny_settings, "training.patch_voxels=[48, 48, 48]"],
        counts=(3, 1, 1),
    )
    write_demo_page(outcome)
    return outcome


def test_the_demo_leaves_every_promised_file(demo: DemoResult) -> None:
    names = {path.name for path in demo.page.parent.iterdir()}
    assert {"phantoms", "run", "predictions", "scores.csv", "index.html"} <= names
    assert len(find_cases(demo.page.parent / "phantoms")) == 5


def test_the_held_out_case_is_not_used_in_training(demo: DemoResult) -> None:
    split = json.loads((demo.page.parent / "run" / "split.json").read_text())
    held_out = list(find_label_cases(demo.page.parent / "predictions"))
    assert [len(split["train"]), len(split["validation"]), len(held_out)] == [3, 1, 1]
    assert not {*split["train"], *split["validation"]} & set(held_out)


def test_the_table_scores_the_held_out_case(demo: DemoResult) -> None:
    with (demo.page.parent / "scores.csv").open(newline="", encoding="utf-8") as file:
        cases = [line["case"] for line in csv.DictReader(file)]
    assert cases == [*find_label_cases(demo.page.parent / "predictions"), "mean", "median"]


def test_the_page_shows_the_case_and_loads_nothing_from_elsewhere(demo: DemoResult) -> None:
    text = demo.page.read_text(encoding="utf-8")
    sources: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            sources.extend(value or "" for name, value in attrs if name == "src" or (tag, name) == ("link", "href"))

    Reader().feed(text)
    assert demo.evaluation.cases[0].case in text
    assert sources
    assert all(source.startswith("data:") for source in sources)


def test_the_json_result_contains_scores_page_and_seconds(demo: DemoResult) -> None:
    content: Any = json.loads(json.dumps(demo.to_json(), allow_nan=False))
    assert set(content["regions"]) == {"WT", "TC", "ET"}
    assert content["page"] == str(demo.page)
    assert list(content["seconds"]) == ["phantoms", "training", "prediction", "evaluation"]


def test_a_non_empty_folder_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "note.txt").touch()
    with pytest.raises(RunError, match="is not empty; give a new folder with --out"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_file_instead_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").touch()
    with pytest.raises(RunError, match="is a file; give a new folder with --out"):
        run_demo(tmp_path / "demo")


def test_progress_goes_from_phantoms_to_prediction(tmp_path: Path, tiny_settings: list[str]) -> None:
    jobs: list[str] = []

    class EnoughError(Exception):
        pass

    def note(progress: Progress) -> None:
        if progress.job not in jobs:
            jobs.append(progress.job)
        if progress.job == "training":
            raise EnoughError

    with pytest.raises(EnoughError):
        run_demo(tmp_path / "demo", overrides=tiny_settings, counts=(1, 1, 1), on_progress=note)
    assert jobs == ["making phantoms", "preparing cases", "training"]
