"""Fixtures shared by the tests: phantoms, a tiny run trained once, and two ways to call the command line.

Under ``--import-mode=importlib`` test files cannot import each other; everything here is a fixture.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

from data.datasets.source import DataSource

# Other jobs on the machine can slow an example down, which is not the program's fault.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# A shell starts background jobs with Ctrl-C ignored, and the processes under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup, and some CI runners, ignore SIGHUP, and the processes under test would inherit that too.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Several workers of pytest-xdist share the processors, so each computes with one thread, as do the processes it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the program does at its start: threads that wait must not keep the processors from other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SCRIPT = Path(sys.executable).with_name("znormseg")


class Outcome(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of prepared cases shared by all tests and the processes they start; the user's own is not touched."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZNORMSEG_CACHE", str(folder))
        patch.delenv("ZNORMSEG_CACHE_GB", raising=False)
        yield folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six phantoms at 4 mm; tests must not modify it."""
    from data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 6, seed=0, spacing_mm=4.0)
    return folder


@pytest.fixture(scope="session")
def case_1mm(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom with voxels declared as 1 mm, in the voxel order of BraTS: a small case for MONAI's BraTS bundle."""
    import nibabel as nib
    import numpy as np

    case = sorted(phantoms.iterdir())[0]
    folder = tmp_path_factory.mktemp("case_1mm") / case.name
    folder.mkdir()
    for path in case.glob("*.nii.gz"):
        voxels = np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)
        nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, -1.0, 1.0, 1.0])), folder / path.name)
    return folder


@pytest.fixture(scope="session")
def tiny_settings() -> list[str]:
    """Overrides in the form of ``--set`` that make a run of the laptop config last a second."""
    return [
        "network.channels=[4, 8]",
        "network.residual_units=1",
        "training.patch_voxels=[16, 16, 16]",
        "training.batch_size=1",
        "training.steps=4",
        "training.validations=1",
        "training.learning_rate=1e-2",
        "runtime.device=cpu",
    ]


@pytest.fixture(scope="session")
def tiny_run(phantoms: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the tiny settings, 60 steps long; tests must not modify it."""
    from app.config.load import load_config
    from app.training.run import start

    run = tmp_path_factory.mktemp("tiny") / "run"
    start(
        DataSource(phantoms),
        run,
        load_config("laptop", [*tiny_settings, "training.steps=60", "training.validations=3"]),
    )
    return run


@pytest.fixture(scope="session")
def real_cases() -> Path:
    """Folder of real cases, given by the environment variable ZNORMSEG_CASES."""
    folder = os.environ.get("ZNORMSEG_CASES")
    if not folder:
        pytest.skip("ZNORMSEG_CASES is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def openvino_computes() -> None:
    """Skip the test if OpenVINO cannot run: on a CPU without AVX2, or if oneDNN may not use AVX2."""
    from app.system.device import without_avx2

    if why := without_avx2():
        pytest.skip(f"OpenVINO needs AVX2, and {why}")


@pytest.fixture(scope="session", autouse=True)
def one_command_line() -> Iterator[None]:
    """Build the tree of commands once for all calls in this process; that takes longer than most of the calls."""
    from typer import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "get_command", functools.cache(main.get_command))
        yield


@pytest.fixture
def znormseg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the command line's entry point in this process: ``znormseg("train", data, run) -> (code, out, err)``."""
    from app.cli.main import run

    propagate = logging.getLogger("znormseg").propagate

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["znormseg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run()
        logging.getLogger("znormseg").propagate = propagate
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def znormseg_process() -> Callable[..., subprocess.Popen[str]]:
    """Start the installed script in a separate process; the caller waits for it."""

    def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SCRIPT, *map(str, arguments)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


@pytest.fixture(scope="session")
def shell() -> Callable[..., Outcome]:
    """Run a command to completion; ``znormseg`` and ``python`` as the first word are the ones under test."""

    def call(
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        timeout: float = 300,
    ) -> Outcome:
        first = {"znormseg": str(SCRIPT), "python": sys.executable}.get(str(command[0]), str(command[0]))
        ended = subprocess.run(
            [first, *map(str, command[1:])],
            cwd=cwd,
            env={**os.environ, "PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}", **(environment or {})},
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return Outcome(ended.returncode, ended.stdout, ended.stderr)

    return call


@pytest.fixture(scope="session")
def write_series() -> Callable[..., list[Path]]:
    """Write a volume as one DICOM file per slice, in random order and with meaningless names.

    ``write_series(folder, voxels, affine, Keyword=value)``: voxels of shape (columns, rows, slices), affine to RAS.
    """
    import numpy as np
    import pydicom
    from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid

    def write(folder: Path, voxels: Any, affine: Any, **fields: Any) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        directions = lps[:3, :3] / spacing
        header = {
            "PatientName": "Mustermann^Erika",
            "PatientID": "PID-4711",
            "PatientBirthDate": "19640812",
            "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.1",
            "SeriesInstanceUID": str(generate_uid()),
            "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.2",
            "Modality": "MR",
            "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
            **dict.fromkeys(("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "PatientSex"), ""),
            **dict.fromkeys(("ReferringPhysicianName", "Manufacturer", "PositionReferenceIndicator"), ""),
            **fields,
        }
        written: list[Path] = []
        for place in np.random.default_rng(voxels.shape[2]).permutation(voxels.shape[2]):
            meta = pydicom.dataset.FileMetaDataset()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            meta.MediaStorageSOPClassUID = MRImageStorage
            image = pydicom.Dataset()
            image.file_meta = meta
            for keyword, value in header.items():
                setattr(image, keyword, value)
            image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, UID(generate_uid())
            meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
            image.InstanceNumber = len(written) + 1
            image.ImagePositionPatient = [f"{mm:.9g}" for mm in (lps @ [0, 0, place, 1])[:3]]
            image.ImageOrientationPatient = [f"{c:.9g}" for c in directions[:, :2].T.ravel()]
            image.PixelSpacing = [f"{spacing[1]:.9g}", f"{spacing[0]:.9g}"]
            image.SliceThickness = f"{spacing[2]:.9g}"
            image.Rows, image.Columns = voxels.shape[1], voxels.shape[0]
            image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
            image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
            image.PixelData = np.ascontiguousarray(voxels[:, :, place].T).astype("<u2").tobytes()
            written.append(folder / f"{abs(hash(str(image.SOPInstanceUID))):x}")
            image.save_as(written[-1], enforce_file_format=True)
        return written

    return write


@pytest.fixture(scope="session")
def phantom_study(phantoms: Path, write_series: Callable[..., list[Path]]) -> Callable[..., Path]:
    """A function that writes the first phantom as a DICOM study of four series to a folder, which it returns.

    The largest value of the contrast ``padded`` is the padding value of its series.
    """
    import nibabel as nib
    import numpy as np

    from data.datasets.layouts import find_cases

    timing = {"t1": (10, 600), "t1c": (10, 600), "t2": (100, 4500), "flair": (120, 9000)}

    def write(folder: Path, *, padded: str | None = None) -> Path:
        for number, (contrast, path) in enumerate(find_cases(phantoms)[0].contrasts.items(), start=1):
            image = nib.Nifti1Image.from_filename(path)
            voxels = np.rint(np.asanyarray(image.dataobj)).clip(0).astype("<u2")
            echo, repetition = timing[contrast]
            write_series(
                folder / str(number),
                voxels,
                image.affine,
                SeriesNumber=str(number),
                SeriesDescription="T1 post Gd" if contrast == "t1c" else contrast.upper(),
                EchoTime=str(echo),
                RepetitionTime=str(repetition),
                InversionTime="2500" if contrast == "flair" else "",
                ScanningSequence="SE",
                **({"PixelPaddingValue": int(voxels.max())} if contrast == padded else {}),
            )
        return folder

    return write


@pytest.fixture(scope="session")
def dicom_study(write_series: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four contrasts and five distractors, in nested folders, partly oblique; tests must not modify it."""
    import numpy as np
    from scipy.spatial.transform import Rotation

    folder = tmp_path_factory.mktemp("study")
    random = np.random.default_rng(0)
    straight = np.array([[-2.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, -20], [0, 0, 0, 1]])
    oblique = np.eye(4)
    oblique[:3, :3] = Rotation.from_euler("xyz", [12, -8, 20], degrees=True).as_matrix() @ straight[:3, :3]
    oblique[:3, 3] = (25, 33, -18)
    sagittal = np.array([[0, 0, 1.5, -10], [-1.5, 0, 0, 25], [0, -1.5, 0, 22], [0, 0, 0, 1]])

    def voxels(*shape: int) -> Any:
        return random.integers(0, 1000, shape)

    def spin(echo: float, repetition: float) -> dict[str, Any]:
        return {"EchoTime": echo, "RepetitionTime": repetition, "ScanningSequence": "SE", "SequenceVariant": "SK"}

    def mprage(**more: Any) -> dict[str, Any]:
        timing = {"EchoTime": 2.9, "RepetitionTime": 1900, "InversionTime": 900, "MRAcquisitionType": "3D"}
        return {**timing, "ScanningSequence": ["GR", "IR"], "SequenceVariant": ["SP", "MP"], **more}

    def add(number: int, shape: tuple[int, int, int], affine: Any, name: str, **more: Any) -> None:
        place = folder / "A" / f"S{number}"
        write_series(place, voxels(*shape), affine, SeriesNumber=number, SeriesDescription=name, **more)

    add(1, (16, 16, 3), straight, "localizer", **mprage())
    add(2, (20, 22, 24), sagittal, "t1_mprage_sag", **mprage())
    add(3, (18, 20, 12), oblique, "t2_tirm_tra_dark-fluid", **spin(94, 9000), InversionTime=2500)
    double = {"SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.3"}
    add(4, (18, 20, 12), oblique, "pd+t2_tse_tra", **double, **spin(12, 3500), EchoNumbers=1)
    add(4, (18, 20, 12), oblique, "pd+t2_tse_tra", **double, **spin(96, 3500), EchoNumbers=2)
    add(5, (16, 16, 12), straight, "ep2d_diff_b1000", EchoTime=80, RepetitionTime=5000, ScanningSequence="EP")
    add(7, (20, 22, 24), sagittal, "t1_mprage_sag KM", **mprage(ContrastBolusAgent="Gadovist"))
    reformatted = {"ImageType": ["DERIVED", "SECONDARY", "MPR"]}
    add(8, (16, 16, 12), straight, "t1_mprage_sag KM MPR tra", **mprage(), **reformatted)
    (folder / "README.txt").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def enhanced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with one enhanced (multi-frame) T1c, oblique, frames unsorted; also its voxels and affine (RAS)."""
    import numpy as np
    import pydicom
    from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid
    from scipy.spatial.transform import Rotation

    def of(**fields: Any) -> pydicom.Sequence:
        item = pydicom.Dataset()
        for keyword, value in fields.items():
            setattr(item, keyword, value)
        return pydicom.Sequence([item])

    random = np.random.default_rng(3)
    voxels = random.integers(0, 4000, (8, 9, 6))  # voxels in multiples of 8: GDCM misreads the last bits of other masks
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [10, 15, -5], degrees=True).as_matrix() @ np.diag([-1.5, -2.0, 4.0])
    affine[:3, 3] = (12, 7, -30)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = EnhancedMRImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = generate_uid()
    for keyword in ("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "PatientSex", "PatientBirthDate"):
        setattr(image, keyword, "")
    image.PatientName, image.PatientID, image.Modality = "Mustermann^Erika", "PID-4711", "MR"
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    image.ReferringPhysicianName = image.Manufacturer = image.PositionReferenceIndicator = ""
    image.SeriesNumber, image.InstanceNumber, image.SeriesDescription = 11, 1, "WIP T1 3D TFE Gd"
    image.ContrastBolusAgentSequence = of(ContrastBolusAgentNumber=1)
    shared = pydicom.Dataset()
    shared.PlaneOrientationSequence = of(
        ImageOrientationPatient=[f"{c:.9g}" for c in (lps[:3, :2] / (1.5, 2.0)).T.ravel()]
    )
    shared.PixelMeasuresSequence = of(PixelSpacing=[2.0, 1.5], SliceThickness=4.0)
    shared.MRTimingAndRelatedParametersSequence = of(RepetitionTime=8.1, FlipAngle=8)
    shared.MREchoSequence = of(EffectiveEchoTime=3.7)
    image.EchoPulseSequence = "GRADIENT"
    image.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    order = random.permutation(voxels.shape[2])
    frames = []
    for place in order:
        frame = pydicom.Dataset()
        frame.PlanePositionSequence = of(ImagePositionPatient=[f"{mm:.9g}" for mm in (lps @ [0, 0, place, 1])[:3]])
        frame.FrameContentSequence = of(DimensionIndexValues=[int(place) + 1])
        frame.PixelValueTransformationSequence = of(RescaleSlope=int(place) + 1, RescaleIntercept=-5, RescaleType="US")
        frames.append(frame)
    image.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    image.NumberOfFrames, image.Rows, image.Columns = len(frames), voxels.shape[1], voxels.shape[0]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.PixelData = np.ascontiguousarray(voxels[:, :, order].transpose(2, 1, 0)).astype("<u2").tobytes()
    folder = tmp_path_factory.mktemp("enhanced")
    image.save_as(folder / "IM_0001", enforce_file_format=True)
    return folder, voxels * (np.arange(voxels.shape[2]) + 1.0) - 5, affine


# Tiny data sets in every layout

_EARLY, _LATE, _PLAIN = ("t1", "t1ce", "t2", "flair"), ("t1n", "t1c", "t2w", "t2f"), ("t1", "t1c", "t2", "flair")
_UCSF = ("T1", "T1c", "T2", "FLAIR")


class _Names(NamedTuple):
    """The file names of a layout."""

    ids: tuple[str, str]
    endings: tuple[str, ...]
    convention: str
    pattern: str = "{id}/{id}-{end}.nii.gz"
    seg: str = "seg"


_BY_NAME = {
    "2015": _Names(("brats_2013_pat0001_1", "brats_tcia_pat105_1"), _EARLY, "brats2015"),
    "2018": _Names(("Brats18_2013_11_1", "Brats18_CBICA_AAB_1"), _EARLY, "brats2021", "HGG/{id}/{id}_{end}.nii.gz"),
    "2019": _Names(("BraTS19_2013_0_1", "BraTS19_TMC_2_1"), _EARLY, "brats2021", "LGG/{id}/{id}_{end}.nii.gz"),
    "2020": _Names(("BraTS20_Training_001", "BraTS20_Training_355"), _EARLY, "brats2021", "{id}/{id}_{end}.nii"),
    "2021": _Names(("BraTS2021_00000", "BraTS2021_00002"), _EARLY, "brats2021", "{id}/{id}_{end}.nii.gz"),
    "2023 GLI": _Names(("BraTS-GLI-00001-000", "BraTS-GLI-00002-000"), _LATE, "brats2023"),
    "2023 SSA": _Names(("BraTS-SSA-00001-000", "BraTS-SSA-00002-000"), _LATE, "brats2023"),
    "2023 MET": _Names(("BraTS-MET-00001-000", "BraTS-MET-00002-000"), _LATE, "brats2023"),
    "2023 MEN": _Names(("BraTS-MEN-00001-000", "BraTS-MEN-00002-000"), _LATE, "brats2023"),
    "2023 odd": _Names(("BraTS-GLI-00001-000", "b"), ("t1n", "T1C", "t2W", "t2f"), "brats2023"),
    "2024 GLI": _Names(("BraTS-GLI-02405-100", "BraTS-GLI-02405-101"), _LATE, "brats2024"),
    "2024 MET": _Names(("BraTS-MET-00001-000", "BraTS-MET-00002-000"), _LATE, "brats2024"),
    "2024 PED": _Names(("BraTS-PED-00001-000", "BraTS-PED-00002-000"), _LATE, "brats2024-ped"),
    "UCSF-PDGM": _Names(
        ("UCSF-PDGM-0004", "UCSF-PDGM-0005"), _UCSF, "brats2021", "{id}_nifti/{id}_{end}.nii.gz", "tumor_segmentation"
    ),
    "case folders": _Names(("a", "b"), _PLAIN, "brats2023"),
    "flat": _Names(("a", "b"), _PLAIN, "msd", "{id}_{end}.nii.gz"),
    "flat 2021": _Names(("BraTS2021_00000", "BraTS2021_00002"), _EARLY, "brats2021", "{id}_{end}.nii.gz"),
    "flat 2023": _Names(("BraTS-GLI-00001-000", "BraTS-GLI-00002-000"), _LATE, "brats2023", "{id}-{end}.nii.gz"),
}


class Rendered(NamedTuple):
    """A tiny data set in one layout, and the expected result of reading it."""

    root: Path
    """The path given to the program."""
    images: dict[str, dict[str, Any]]
    """Voxels by case and contrast."""
    codes: dict[str, Any]
    """Label map in the program's codes, by case."""
    maps: dict[str, Any]
    """Label map with the file's numbers, by case."""


@pytest.fixture(scope="session")
def render() -> Callable[[Path, str], Rendered]:
    """Write two cases of 8x8x8 voxels in a layout: ``render(folder, "2021")``; see :data:`_BY_NAME` and below."""

    def write(root: Path, layout: str) -> Rendered:
        if layout in _BY_NAME:
            return _write_by_name(root, _BY_NAME[layout])
        if layout == "MSD":
            return _write_msd(root, _two_cases("BRATS_001", "BRATS_457", "msd"))
        if layout == "nnU-Net":
            regions = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
            return _write_nnunet(root, _two_cases("BraTS2021_00000", "BraTS2021_00002", "msd"), regions)
        if layout == "nnU-Net labels":
            return _write_nnunet(root, _two_cases("a", "b", "brats2023"), {"background": 0, "NCR": 1, "ED": 2, "ET": 3})
        return _write_manifest(root, _two_cases("a", "b", "msd"))

    return write


def _two_cases(first: str, second: str, convention: str) -> Rendered:
    """Images and tumours; the second has no enhancing tumour. Label maps use every number of their convention."""
    import numpy as np

    from data.labels import CONTRASTS, CONVENTIONS, encode

    given = Rendered(Path(), {}, {}, {})
    brain = np.pad(np.arange(1, 217).reshape(6, 6, 6), 1)
    for number, case in enumerate((first, second)):
        given.images[case] = {
            contrast: brain * (number + 1) + 1000 * step * (brain > 0) for step, contrast in enumerate(CONTRASTS)
        }
        codes = np.zeros((8, 8, 8), dtype=np.uint8)
        codes[2:6, 2:6, 2:6] = 2
        codes[3:5, 3:5, 3:5] = 1
        codes[5, 3:6, 3] = 3 if number == 0 else 1
        labels = encode(codes, CONVENTIONS[convention])
        for value in CONVENTIONS[convention].also_necrosis:
            labels[3, 3, 3:5] = value
        for value in CONVENTIONS[convention].also_background:
            labels[2, 2, 5], codes[2, 2, 5] = value, 0
        given.codes[case], given.maps[case] = codes, labels
    return given


def _save(path: Path, voxels: Any, dtype: str = "int16") -> None:
    import nibabel as nib
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(voxels, dtype=dtype), np.diag([-1.0, -1.0, 2.0, 1.0])), path)


def _write_by_name(root: Path, names: _Names) -> Rendered:
    given = _two_cases(*names.ids, names.convention)
    for case, images in given.images.items():
        for voxels, end in zip(images.values(), names.endings, strict=True):
            _save(root / names.pattern.format(id=case, end=end), voxels)
        seg = names.pattern.format(id=case, end=names.seg)
        _save(root / (f"{case}/W39_1998.09.19_Segm.nii" if case.endswith("_355") else seg), given.maps[case], "uint8")
    return given._replace(root=root)


def _write_msd(root: Path, given: Rendered) -> Rendered:
    import numpy as np

    for case, images in given.images.items():
        _save(root / f"imagesTr/{case}.nii.gz", np.stack([images[c] for c in ("flair", "t1", "t1c", "t2")], axis=3))
        _save(root / f"labelsTr/{case}.nii.gz", given.maps[case], "uint8")
        (root / f"imagesTr/._{case}.nii.gz").write_bytes(b"macOS")
    labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    (root / "dataset.json").write_text(json.dumps({"modality": modality, "labels": labels}))
    return given._replace(root=root)


def _write_nnunet(root: Path, given: Rendered, labels: dict[str, Any]) -> Rendered:
    channels = {"t2": "T2", "t1c": "T1ce", "flair": "FLAIR", "t1": "T1"}
    for case, images in given.images.items():
        for number, contrast in enumerate(channels):
            _save(root / f"imagesTr/{case}_{number:04d}.nii.gz", images[contrast])
        _save(root / f"labelsTr/{case}.nii.gz", given.maps[case], "uint8")
    names = dict(enumerate(channels.values()))
    (root / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": labels, "file_ending": ".nii.gz"}))
    return given._replace(root=root)


def _write_manifest(root: Path, given: Rendered) -> Rendered:
    rows = ["id,FLAIR,t1,t1gd,T2w,label,labels,age"]
    for case, images in given.images.items():
        for contrast, voxels in images.items():
            _save(root / f"any/{case}/{contrast}.nii", voxels)
        _save(root / f"any/{case}/truth.nii", given.maps[case], "uint8")
        files = [f"any/{case}/{name}.nii" for name in ("flair", "t1", "t1c", "t2", "truth")]
        rows.append(",".join([case, *files, "msd", "50"]))
    (root / "cases.csv").write_text("\n".join([*rows, ""]))
    return given._replace(root=root / "cases.csv")
