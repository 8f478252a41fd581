"""Look at an upload in a process of its own: unpack it, recognise its cases, and check their images.

Decoders of images are native code, and uploads come from outside. ``python -m app.service.intake`` therefore works in
a process with limits; whatever ends it, the service only refuses the upload. The request comes as JSON on standard
input, the answer leaves as JSON on standard output.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from app.service.archive import checked_archive, unpack
from app.service.recognise import NamedCase, recognised_cases
from app.service.refusals import RefusedError
from app.system.process import own_environment
from data.contrasts import missing_contrasts
from data.datasets.naming import SUFFIXES_2021
from data.datasets.source import DataSource
from data.dicom.files import is_study
from data.errors import DataError
from data.filesystem import locked_folder
from data.labels import Contrast
from data.nifti import is_compressed
from data.quality.check import check

#: Seconds after which an upload is refused.
MOST_SECONDS: Final = 900
#: Address space of the process, in bytes.
_MOST_MEMORY: Final = 12 * 2**30
#: Cases of one upload.
MOST_CASES: Final = 500
#: Kinds of findings that :mod:`app.service.recognise` reports itself, with the user's names.
_ABOUT_NAMES: Final = ("missing contrast", "duplicate contrast", "names and links")
#: Processes that look at an upload now, without those that were stopped.
_looks: Final[set[subprocess.Popen[str]]] = set()


def look_at(folder: Path, files: Sequence[Mapping[str, Any]], most_bytes: int) -> list[dict[str, Any]]:
    """Look at an upload in a new process.

    Args:
        folder: the upload's folder; ``received`` is read, and ``cases`` is written.
        files: name and, if the user stated it, contrast of each file in ``received``.
        most_bytes: most bytes after unpacking.

    Returns:
        the cases as plain data: ``name``, ``case`` (as in :data:`app.inference.batch.job.CASE`, with paths below
        ``cases``), ``files`` (the user's name of each contrast), ``missing`` contrasts, ``problems`` that prevent a
        prediction, ``warnings``, ``notes``, and whether it is from ``dicom``.

    Raises:
        DataError: the upload is refused; the message says why.
        OSError: the disk is full.
        RefusedError: the service stops, and :func:`stop_looks` ended the process.
    """
    environment = own_environment() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    request = {"folder": str(folder), "files": list(files), "most_bytes": most_bytes}
    text = _answer_of_process(json.dumps(request), environment)
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise DataError("the files could not be read: they are damaged, or too large for this service.") from error
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), "the upload")
    if "refused" in answer:
        raise DataError(answer["refused"])
    cases: list[dict[str, Any]] = answer["cases"]
    return cases


def _answer_of_process(request: str, environment: Mapping[str, str]) -> str:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "app.service.intake"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        _looks.add(process)
        try:
            text, _ = process.communicate(request, timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise DataError(f"the files could not be read within {MOST_SECONDS} s.") from error
        finally:
            stopped = process not in _looks
            _looks.discard(process)
            process.kill()  # has no effect if it has ended
    if stopped:
        raise RefusedError(503, "The service is stopping. Complete the upload again later.", retry_seconds=10)
    return text


def stop_looks() -> None:
    """End all processes that look at an upload; each of these uploads can be completed again."""
    for process in list(_looks):
        _looks.discard(process)
        process.kill()


def _look(folder: Path, files: Sequence[Mapping[str, Any]], most_bytes: int) -> list[dict[str, Any]]:
    """Fill ``cases`` with hard links, so that it can be repeated after a crash."""
    for part in ("cases", "unpacked"):
        shutil.rmtree(folder / part, ignore_errors=True)
    received, cases = folder / "received", folder / "cases"
    cases.mkdir()
    names = [str(one["name"]) for one in files]
    stated: dict[int, Contrast] = {number: one["contrast"] for number, one in enumerate(files) if one.get("contrast")}
    paths = [received / f"{number:05}" for number in range(len(files))]
    source = received
    if len(files) == 1 and zipfile.is_zipfile(paths[0]):
        source, stated = folder / "unpacked", {}
        names, paths = _unpacked(paths[0], source, most_bytes)
    found = recognised_cases(names, stated)
    if not any(case.contrasts or case.problems for case in found) and is_study(source):
        return [_dicom_case(source, cases)]
    if not found:
        raise DataError("no image was found. Send four NIfTI files (.nii, .nii.gz), a .zip of them, or a DICOM study.")
    if len(found) > MOST_CASES:
        raise DataError(f"{len(found)} cases were found; at most {MOST_CASES} are allowed in one upload.")
    return [
        _checked_case(_placed(number, case, names, paths, cases), cases / f"{number:05}")
        for number, case in enumerate(found)
    ]


def _unpacked(archive: Path, place: Path, most_bytes: int) -> tuple[list[str], list[Path]]:
    """Unpack an archive to files that are named by their numbers."""
    place.mkdir()
    names, paths = [], []
    with checked_archive(archive, most_bytes) as (opened, entries):
        for number, entry in enumerate(entries):
            path = place / f"{number:05}"
            unpack(opened, entry, path)
            names.append(str(entry.name))
            paths.append(path)
    return names, paths


def _placed(number: int, case: NamedCase, names: Sequence[str], paths: Sequence[Path], cases: Path) -> dict[str, Any]:
    """Link the files of a case to their place, and describe the case."""
    folder = cases / f"{number:05}"
    folder.mkdir()
    contrasts: dict[Contrast, Path] = {}
    for contrast, file in case.contrasts.items():
        ending = ".nii.gz" if is_compressed(paths[file]) else ".nii"
        contrasts[contrast] = folder / f"case_{SUFFIXES_2021[contrast]}{ending}"
        os.link(paths[file], contrasts[contrast])
    problems = list(case.problems)
    if not contrasts:
        problems.append("no file is named after a contrast. State the contrast of each file.")
    return {
        "name": case.name,
        "case": {
            "id": "case",
            "folder": folder.name,
            "contrasts": {contrast: f"{folder.name}/{path.name}" for contrast, path in contrasts.items()},
            "naming": case.naming,
        },
        "files": {contrast: names[file] for contrast, file in case.contrasts.items()},
        "missing": list(missing_contrasts(contrasts)),
        "problems": problems,
        "warnings": [],
        "notes": list(case.notes),
        "dicom": False,
    }


def _checked_case(shown: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add what the images of a case show, as ``znormseg data check`` does."""
    if not shown["case"]["contrasts"]:
        return shown
    try:
        (checked,) = check(DataSource(folder)).cases
    except DataError as error:
        return {**shown, "problems": [*shown["problems"], _without_paths(str(error), folder)]}
    places = {"unreadable": "problems", "problem": "warnings", "note": "notes"}
    for finding in checked.findings:
        if finding.kind not in _ABOUT_NAMES:
            place = places[finding.kind if finding.kind in places else finding.severity]
            shown[place] = [*shown[place], _without_paths(finding.sentence, folder)]
    return shown


def _dicom_case(source: Path, cases: Path) -> dict[str, Any]:
    """Convert a DICOM study to a case; the study stays, for a DICOM segmentation of it."""
    from data.dicom.series_choice import choose_series
    from data.dicom.study import open_study, read_chosen, write_dicom_case

    with open_study(source) as study:
        images = read_chosen(study, choose_series(study.series))
    folder = write_dicom_case(cases, images, case_id="case").rename(cases / "00000")
    return {
        "name": images.case_id,
        "case": {
            "id": "case",
            "folder": folder.name,
            "contrasts": {
                contrast: f"{folder.name}/case_{suffix}.nii.gz" for contrast, suffix in SUFFIXES_2021.items()
            },
            "naming": None,
        },
        "files": {contrast: f"series {choice.series.key}" for contrast, choice in images.choices.items()},
        "missing": [],
        "problems": [],
        "warnings": [],
        "notes": [note for notes in images.notes.values() for note in notes],
        "dicom": True,
    }


def _without_paths(text: str, folder: Path) -> str:
    return text.replace(f"{folder}{os.sep}", "").replace(str(folder), "the upload")


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    os.umask(0o077)


def _answer() -> dict[str, Any]:
    _limit()
    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    try:
        with locked_folder(folder):  # a process of a service that was killed may still look at this upload
            return {"cases": _look(folder, request["files"], request["most_bytes"])}
    except DataError as error:
        return {"refused": _without_paths(str(error), folder)}
    except MemoryError:
        return {"refused": "the files need more memory than this service allows."}
    except OSError as error:
        if error.errno is None:
            raise
        return {"errno": error.errno}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer()))
