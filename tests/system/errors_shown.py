"""The errors that docs/errors.md lists, by topic, with the commands that cause them.

tests/system/test_docs_errors.py runs the commands and compares what they print with the document.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

Call = Callable[..., Any]

CASE, OTHER = "BraTS2021_00000", "BraTS2021_00001"
IMAGE, LABEL = f"DATA/{CASE}/{CASE}_t2.nii.gz", f"DATA/{CASE}/{CASE}_seg.nii.gz"
PREDICT, TRAIN = f"znormseg predict RUN DATA/{CASE} OUT", "znormseg train DATA NEW"
PREPARE = f"znormseg data prepare DATA/{CASE} OUT"
CROSSVAL = "znormseg crossval DATA CROSSVAL --folds 2"
FURTHER = "znormseg crossval DATA OUT --init-from CROSSVAL/ensemble"
TORCHRUN = "torchrun --nproc-per-node 2 --no-python znormseg"
PRESENCE = "znormseg train DATA NEW --config presence --set task.labels_csv=labels.csv"
ALL_LABELLED = ("case,ET", f"{CASE},1", f"{OTHER},0", "BraTS2021_00002,0")
CONTRASTS = ("t1", "t1ce", "t2", "flair")


def module(name: str) -> Any:
    """Another test file, which pytest imports under its own name."""
    spec = importlib.util.spec_from_file_location(f"{name}_for_errors", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


bad = module("test_bad_input")
hostile = module("test_hostile_machine")


@dataclass(kw_only=True)
class Scene:
    """The working folder of a row: three cases as DATA, a small run as RUN; and what may be done in it."""

    place: Path
    phantoms: Path
    study: Path
    crossval: Path
    """A cross-validation that ended, to copy."""
    render: Call
    znormseg: Call
    patch: pytest.MonkeyPatch
    """Undone after the row, as is what ``held`` holds."""
    held: ExitStack
    token: str = ""
    """Of a service that the row has started."""


Prepare = Callable[[Scene], object]


def nothing(_: Scene) -> None:
    """Leave all as it is."""


def always() -> bool:
    """It can be shown on any machine."""
    return True


@dataclass(kw_only=True)
class Shown:
    """A command that meets an error."""

    command: str
    """As one types it: variables, then ``znormseg``, and after it what this process is given."""
    code: int
    prepare: Prepare = nothing
    title: str = ""
    """What is wrong with the input."""
    remedy: str = ""
    """What to do, where the message does not say it."""
    listed: bool = True
    """Whether the document has a row for it; False where a row with another name or number stands for it."""
    small: bool = False
    """Whether small settings of a training are added, and not shown."""
    before: Callable[[], list[str]] | None = None
    """Command prefix, not shown; with one, even an empty one, the command runs in a separate process."""
    only: str = ""
    """Pattern of the lines that are the message; without it, the message begins where the program's own lines do."""
    steady: dict[str, str] = field(default_factory=dict)
    """What differs from run to run or from machine to machine: a pattern, and what stands for it."""
    possible: Callable[[], bool] = always
    """Whether this machine can show it."""


@dataclass(kw_only=True)
class Raised:
    """An error that no command meets on every machine; it is raised by hand."""

    error: Callable[[], Exception]
    remedy: str = ""
    listed: bool = True

    def message(self) -> str:
        """What the program prints of it."""
        from app import errors

        return errors.message(self.error())

    @property
    def code(self) -> int:
        """The exit code."""
        from app import errors

        return errors.exit_code(self.error())


# Bad files


def image(name: str, remedy: str = "") -> Shown:
    """A row of BAD_IMAGES."""
    spoil, _ = bad.BAD_IMAGES[name]
    return Shown(title=name, command=PREDICT, code=3, prepare=lambda _: spoil(Path(IMAGE).absolute()), remedy=remedy)


def unlisted(shown: Shown) -> Shown:
    """A command whose message a row with another name or number stands for."""
    return replace(shown, listed=False)


def image_that(title: str, spoil: Callable[[Path], object]) -> Shown:
    """A T2 spoilt in a way no other file is."""
    return Shown(title=title, command=PREDICT, code=3, prepare=lambda _: spoil(Path(IMAGE).absolute()))


def label(name: str) -> Shown:
    """A row of BAD_LABELS."""
    spoil, _ = bad.BAD_LABELS[name]
    title = f"label map: {name}" if name in bad.BAD_IMAGES or name == "empty file" else name
    return Shown(title=title, command=TRAIN, code=3, small=True, prepare=lambda _: spoil(Path(LABEL).absolute()))


def setting(name: str, remedy: str = "") -> Shown:
    """A row of BAD_SETTINGS."""
    return Shown(title=name, command=f"{TRAIN} --set '{bad.BAD_SETTINGS[name][0]}'", code=4, remedy=remedy)


def run(name: str, remedy: str = "") -> Shown:
    """A row of BAD_RUNS."""
    spoil, _ = bad.BAD_RUNS[name]
    return Shown(title=name, command=PREDICT, code=5, prepare=lambda _: spoil(Path("RUN").absolute()), remedy=remedy)


def by_two_rules(scene: Scene) -> None:
    """Scores of the predictions in OUT by the rules of two years."""
    for name, rules in (("one", "brats2023"), ("other", "brats2024")):
        ended = scene.znormseg("evaluate", "OUT", "DATA", "--rules", rules, "--json")
        Path(f"{name}.json").write_text(ended.out)


def written(name: str, text: str) -> Prepare:
    """Write a file of that text."""
    return lambda _: Path(name).write_text(text)


def labels(*lines: str) -> Prepare:
    """Write a table of labels."""
    return written("labels.csv", "\n".join([*lines, ""]))


def change(name: str, edit: Callable[[Any], Any], dtype: Any = np.float32) -> Prepare:
    """Give a file other voxels."""
    return lambda _: bad.change(Path(name), edit, dtype)


def flipped(path: Path) -> None:
    """Change a bit of the checksum at the end."""
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


def singular(path: Path) -> None:
    """An affine that leaves one axis without a length."""
    stored: Any = nib.load(path)
    header, voxels = stored.header.copy(), np.asarray(stored.dataobj)
    header["srow_x"], header["sform_code"], header["qform_code"] = 0, 1, 0
    nib.save(nib.Nifti1Image(voxels, None, header), path)


def radiotherapy(_: Scene) -> None:
    """A case with one contrast and a target."""
    folder = Path("MEN-RT/BraTS-MEN-RT-0001-1")
    folder.mkdir(parents=True)
    for ending, name in (("t1ce", "t1c"), ("seg", "gtv")):
        shutil.copy(f"DATA/{CASE}/{CASE}_{ending}.nii.gz", folder / f"{folder.name}_{name}.nii.gz")


def unlabelled(_: Scene) -> None:
    """A case without its label map."""
    shutil.copytree(f"DATA/{CASE}", f"UNLABELLED/{CASE}", ignore=shutil.ignore_patterns("*_seg*"))


def renamed(to: str) -> Prepare:
    """Call the files of a case otherwise."""

    def rename(_: Scene) -> None:
        for path in list(Path(f"DATA/{CASE}").iterdir()):
            path.rename(path.with_name(path.name.replace(CASE, to)))

    return rename


# Scans


def smaller(_: Scene) -> None:
    """Only the middle of each image, which is prepared faster."""
    for path in Path(f"DATA/{CASE}").iterdir():
        stored: Any = nib.load(path)
        kept = stored.slicer[12:48, 12:48, 8:32]
        nib.save(nib.Nifti1Image(np.asarray(kept.dataobj), kept.affine), path)


def noise(_: Scene) -> None:
    """Put noise where the T2 was."""
    voxels = np.random.default_rng(0).random((36, 36, 24)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4, 4, 1])), IMAGE)


def tool(script: str, *, name: str = "hd-bet") -> Prepare:
    """Install a command, a shell script."""

    def install(scene: Scene) -> None:
        Path("BIN").mkdir()
        Path("BIN", name).write_text(f"#!/bin/sh\n{script}\n")
        Path("BIN", name).chmod(0o755)
        scene.patch.setenv("PATH", f"{scene.place / 'BIN'}{os.pathsep}{os.environ['PATH']}")

    return install


def no_models(scene: Scene) -> None:
    """Take an own folder of published models, in which none is installed."""
    scene.patch.setenv("ZNORMSEG_MODELS", "MODELS")


def without_shipped_models(scene: Scene) -> None:
    """A copy of the program without the weights that ship with it."""
    from app.runs import published

    scene.patch.setattr(published, "shipped_folder", lambda: Path("MODELS"))


def mask_elsewhere(_: Scene) -> None:
    """A mask a metre away."""
    stored: Any = nib.load(f"DATA/{CASE}/{CASE}_t1ce.nii.gz")
    mask, affine = (np.asarray(stored.dataobj) > 0).astype(np.uint8), stored.affine.copy()
    affine[:3, 3] += 1000
    nib.save(nib.Nifti1Image(mask, affine), "MASK.nii.gz")


def heads(_: Scene) -> None:
    """Scans with noise in the air around the head, so that no single value is the background."""
    draw = np.random.default_rng(0)
    for ending in CONTRASTS:
        noisy = Path(f"DATA/{CASE}/{CASE}_{ending}.nii.gz")
        bad.change(noisy, lambda voxels: voxels + draw.integers(5, 40, voxels.shape))


# Predictions


def predictions(
    edit: Callable[[Path], object] = lambda _: None, *, folder: str = "OUT", case: str = CASE, record: bool = False
) -> Prepare:
    """One label map, of the expert."""

    def make(_: Scene) -> None:
        place = Path(folder, f"{case}.nii.gz").absolute()
        place.parent.mkdir(exist_ok=True)
        shutil.copy(f"DATA/{case}/{case}_seg.nii.gz", place)
        if record:
            place.with_name(f"{case}.json").write_text("{}")
        edit(place)

    return make


def both(*steps: Prepare) -> Prepare:
    """One after the other."""

    def take(scene: Scene) -> None:
        for step in steps:
            step(scene)

    return take


def two_sets(case: str = CASE) -> Prepare:
    """Two sets of predictions; the second may be of another case."""
    return both(predictions(), predictions(folder="OTHER", case=case))


# DICOM


def study(change: Callable[[Path], object] = lambda _: None) -> Prepare:
    """The study as STUDY, changed."""

    def make(scene: Scene) -> None:
        shutil.copytree(scene.study, "STUDY")
        change(Path("STUDY/A"))

    return make


def headers(edit: Callable[[Any], object], folder: str, most: int | None = None) -> Callable[[Path], None]:
    """Edit headers of a series, in the order of its slices."""

    def edit_all(root: Path) -> None:
        import pydicom

        files = sorted((root / folder).iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
        for path in files[:most]:
            data_set = pydicom.dcmread(path)
            edit(data_set)
            data_set.save_as(path)

    return edit_all


def slice_taken_out(root: Path) -> None:
    """Take the middle slice out of the FLAIR."""
    import pydicom

    files = sorted((root / "S3").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    files[len(files) // 2].unlink()


def twice_acquired(root: Path) -> None:
    """A second T2."""
    import pydicom

    for path in list((root / "S4").iterdir()):
        again = pydicom.dcmread(path)
        again.SeriesInstanceUID, again.SeriesNumber = "1.2.3", 12
        again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        again.save_as(path.with_name(f"{path.name}-again"))


def film(data_set: Any) -> None:
    """Voxels as a film, which nobody decodes."""
    import pydicom

    data_set.PixelData = pydicom.encaps.encapsulate([data_set.PixelData])
    data_set["PixelData"].is_undefined_length = True
    data_set.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML


def rescaled(data_set: Any) -> None:
    """A slope and an intercept."""
    data_set.RescaleSlope, data_set.RescaleIntercept = 2, 0


def all_padding(data_set: Any) -> None:
    """A range of padding that covers every voxel."""
    data_set.add_new(0x00280120, "US", 0)
    data_set.add_new(0x00280121, "US", 4095)


def zipped(*, locked: bool) -> Prepare:
    """An archive that points out of itself, or with a password."""

    def make(_: Scene) -> None:
        with zipfile.ZipFile("STUDY.zip", "w") as archive:
            archive.writestr("a.dcm" if locked else "../a.dcm", bytes(200))
        content = bytearray(Path("STUDY.zip").read_bytes())
        if locked:  # the flag, in the file's own entry and in the directory at the end
            content[6] |= 1
            content[content.index(b"PK\x01\x02") + 8] |= 1
        Path("STUDY.zip").write_bytes(content)

    return make


def drawn(value: int) -> Prepare:
    """A label map on the grid of the study's T1c."""

    def make(scene: Scene) -> None:
        assert scene.znormseg("data", "dicom", "STUDY", "CASES").code == 0
        stored: Any = nib.load(next(Path("CASES").rglob("*_t1ce.nii.gz")))
        voxels = np.zeros(stored.shape, dtype=np.uint8)
        voxels[5:9, 5:9, 5:9] = value
        nib.save(nib.Nifti1Image(voxels, stored.affine), "SEG.nii.gz")

    return make


# Descriptions


def rendered(layout: str, then: Callable[[Path], object] = lambda _: None) -> Prepare:
    """Two cases of 8x8x8 voxels as SET, in a layout."""
    return lambda scene: then(scene.render(Path("SET").absolute(), layout).root)


def described(**changes: Any) -> Callable[[Path], object]:
    """Change a dataset.json."""

    def rewrite(root: Path) -> None:
        content = json.loads((root / "dataset.json").read_text())
        (root / "dataset.json").write_text(json.dumps({**content, **changes}))

    return rewrite


def whole_data(then: Callable[[Path], object]) -> Prepare:
    """All cases of the run as DATA, and a change of the first one's label map."""

    def make(scene: Scene) -> None:
        for case in scene.phantoms.iterdir():
            shutil.copytree(case, Path("DATA", case.name), dirs_exist_ok=True)
        then(Path(LABEL).absolute())

    return make


# What data check finds


def found(kind: str, code: int, prepare: Prepare, about: str = "") -> Shown:
    """A finding of a kind; ``about`` chooses one of several."""
    only = f": {kind}: {about}"
    return Shown(title=kind, command="znormseg data check DATA", code=code, prepare=prepare, only=only)


def renamed_to(name: str, case: str = CASE) -> Prepare:
    """A case under another id."""

    def rename(_: Scene) -> None:
        folder = Path(f"DATA/{case}").rename(f"DATA/{name}")
        for path in folder.iterdir():
            path.rename(folder / path.name.replace(case, name))

    return rename


def voxels_of(ending: str, case: str = CASE) -> Any:
    """Those of a contrast."""
    stored: Any = nib.load(f"DATA/{case}/{case}_{ending}.nii.gz")
    return np.asarray(stored.dataobj, dtype=np.float32)


def swap(_: Scene) -> None:
    """T2 and FLAIR under each other's name."""
    flair = Path(IMAGE.replace("t2", "flair"))
    t2 = Path(IMAGE).rename("kept.nii.gz")
    flair.rename(IMAGE)
    t2.rename(flair)


def again(_: Scene) -> None:
    """A case once more, exported with another brightness and some noise."""
    folder = Path("DATA/BraTS2021_00009")
    folder.mkdir()
    draw = np.random.default_rng(0)
    for path in Path(f"DATA/{CASE}").iterdir():
        copy = Path(shutil.copy(path, folder / path.name.replace(CASE, folder.name)))
        if "seg" not in path.name:
            bad.change(copy, lambda v: np.where(v != 0, 1.7 * v + draw.normal(0, 1, v.shape), 0))


def skull(_: Scene) -> None:
    """Fluid, bone and scalp around the brain of the T2, over a background of 0."""
    from scipy import ndimage

    brain = voxels_of("t2")
    away_mm = ndimage.distance_transform_edt(brain == 0, sampling=4.0)
    bright = float(np.median(brain[brain != 0]))
    shells = [(away_mm > 0) & (away_mm <= 4), (away_mm > 4) & (away_mm <= 9), (away_mm > 9) & (away_mm <= 16)]
    head = np.select(shells, [2.0 * bright, 0.15 * bright, 1.3 * bright], brain)
    bad.change(Path(IMAGE), lambda _: head)


def labelled_where_dark(_: Scene) -> None:
    """A label map of the darkest brain."""
    flair, labels = voxels_of("flair"), voxels_of("seg")
    dark = (flair > 0) & (flair < np.median(flair[labels > 0]) / 2)
    bad.change(Path(LABEL), lambda _: dark, np.uint8)


def island(labels: Any) -> Any:
    """A single voxel."""
    labels[1, 1, 1] = 1
    return labels


def thick(_: Scene) -> None:
    """Every third slice of each file."""
    for path in Path(f"DATA/{CASE}").iterdir():
        stored: Any = nib.load(path)
        kept = stored.slicer[:, :, ::3]
        nib.save(nib.Nifti1Image(np.asarray(kept.dataobj), kept.affine), path)


# The service

PORT = 8765
SERVE, URL = "znormseg serve --data SERVICE --model RUN", f"http://127.0.0.1:{PORT}"


def port_is_free() -> bool:
    """Whether a server of the test can listen on the port that the commands name."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", PORT)) != 0


def listening(scene: Scene) -> None:
    """Another program listens on the port."""
    scene.held.enter_context(socket.create_server(("127.0.0.1", PORT)))


def made_service() -> Any:
    """A service with the user ann in SERVICE."""
    from app.service.service import create_service
    from app.service.settings import ServiceSettings

    made = create_service(ServiceSettings(folder=Path("SERVICE").absolute(), models={"run": Path("RUN")}))
    made.accounts.add("ann", "correct horse battery", "admin")
    return made


def with_a_user(_: Scene) -> None:
    """A service that is stopped."""
    made_service().database.close()


def newer_database(_: Scene) -> None:
    """A database that a version made which does not exist yet."""
    made = made_service()
    with made.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'next'")
    made.database.close()


def no_database(_: Scene) -> None:
    """A database that is damaged."""
    Path("SERVICE").mkdir()
    Path("SERVICE/service.db").write_text("damaged " * 1000)


def second_service(scene: Scene) -> None:
    """A service that uses the folder."""
    from app.service.serve import only_service

    Path("SERVICE").mkdir()
    scene.held.enter_context(only_service(Path("SERVICE")))


def password(text: str) -> Prepare:
    """What a user types."""
    return lambda scene: scene.patch.setattr("sys.stdin", io.StringIO(f"{text}\n"))


def patience_of_one(scene: Scene) -> None:
    """A client that tries once."""
    scene.patch.setattr("app.service.client._ATTEMPTS", 1)


def token(text: str | None = None) -> Prepare:
    """A file with a token: a text, or that of ann."""

    def write(scene: Scene) -> None:
        Path("token.txt").write_text(text or scene.token)

    return write


def live(*, tls: bool = False) -> Prepare:
    """A service that answers, and computes nothing."""

    def run(scene: Scene) -> None:
        import uvicorn

        from app.service.http_server import HttpSettings, http_config
        from app.service.site import create_site

        scene.patch.setenv("XDG_STATE_HOME", str(scene.place))
        made = made_service()
        scene.token = made.accounts.add_token("ann")
        http = HttpSettings(port=PORT)
        if tls:
            subject = ["-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"]
            command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject]
            subprocess.run(command, check=True, capture_output=True)
            http = HttpSettings(port=PORT, certificate=Path("cert.pem"), key=Path("key.pem"))
        server = uvicorn.Server(http_config(create_site(made), http))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)

        def stop() -> None:
            server.should_exit = True
            thread.join()
            made.database.close()

        scene.held.callback(stop)

    return run


def remote(command: str, *steps: Prepare, code: int, title: str = "", **more: Any) -> Shown:
    """A command to a service that answers, with the token of a file."""
    line = f"znormseg remote {command} --token-file token.txt"
    return Shown(title=title, command=line, code=code, prepare=both(*steps), possible=port_is_free, **more)


# Machine


def can_mount() -> bool:
    """Whether a process may mount its own disk."""
    return bool(hostile.can_mount())


def can_be_kept_out() -> bool:
    """Whether a process can be kept from writing."""
    return not hostile.UNPRIVILEGED or shutil.which("setpriv") is not None


def on_a_small_disk(kilobytes: int) -> Callable[[], list[str]]:
    """A disk of so many kB as DISK."""
    return lambda: ["unshare", "--mount", "sh", "-c", hostile.ON_A_SMALL_DISK, "sh", str(kilobytes), "DISK"]


def site(script: str) -> Prepare:
    """Have each Python that is started from now on begin with a script."""

    def install(scene: Scene) -> None:
        Path("SITE").mkdir()
        Path("SITE/sitecustomize.py").write_text(script)
        known = os.environ.get("PYTHONPATH", "")
        scene.patch.setenv("PYTHONPATH", f"{scene.place / 'SITE'}{os.pathsep}{known}")

    return install


def refusing(module: str, name: str, number: str, when: str = "True") -> str:
    """A script for :func:`site`: a function of the system fails where an expression of its arguments ``a`` holds."""
    return (
        f"import errno, os, stat, {module}\n"
        f"def refused(*a, real={module}.{name}):\n"
        f"    if {when}:\n"
        f"        raise OSError(errno.{number}, os.strerror(errno.{number}))\n"
        "    return real(*a)\n"
        f"{module}.{name} = refused\n"
    )


def killed_at(worker: str, place: str) -> Prepare:
    """Have a kind of worker be ended by SIGKILL when it opens a file."""
    return site(
        "import os, signal, sys\n"
        "def deadly(event, arguments):\n"
        f"    if event == 'open' and {place!r} in str(arguments[0]) and {worker!r} in ' '.join(sys.orig_argv):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(deadly)\n"
    )


def stopped_in_step(number: int, by: signal.Signals = signal.SIGTERM) -> Prepare:
    """A signal in the middle of a step."""

    def make(scene: Scene) -> None:
        at_step(scene, number, lambda: signal.raise_signal(by))

    return make


def at_step(scene: Scene, number: int, act: Callable[[], object]) -> None:
    """Have something happen in a step of the training, counted from 1."""
    from app.training.step import Stepper

    steps = Stepper.queue

    def acting(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.step + 1 == number:
            act()
        return steps(self, *arguments, **options)

    scene.patch.setattr(Stepper, "queue", acting)


def cache_goes(scene: Scene) -> None:
    """Prepared cases are cut short while the run uses them."""
    scene.patch.setenv("ZNORMSEG_CACHE", str(scene.place / "CACHE"))

    def cut() -> None:
        for path in scene.place.glob("CACHE/*/*.npy"):
            path.write_bytes(b"")

    at_step(scene, 2, cut)


def stopped_while_predicting(scene: Scene) -> None:
    """Ctrl-C while the second case is computed."""
    from app.inference.batch.predict import PredictSteps

    compute = PredictSteps.compute

    def interrupted(steps: Any, read: Any, on_step: Any) -> Any:
        if read.case.id == OTHER:
            signal.raise_signal(signal.SIGINT)
        return compute(steps, read, on_step)

    scene.patch.setattr(PredictSteps, "compute", interrupted)


def in_use(scene: Scene) -> None:
    """Another holds the run's lock."""
    import fcntl

    from app.runs.folder import LOCK

    file = Path("RUN", LOCK).open("a")  # noqa: SIM115 - closed after the row
    fcntl.flock(scene.held.enter_context(file), fcntl.LOCK_EX)


def without(package: str) -> Prepare:
    """As if a package were not installed."""
    return lambda scene: scene.patch.setitem(sys.modules, package, None)


def without_onnx(scene: Scene) -> None:
    """As if ONNX Runtime were not installed."""
    from importlib import util

    find = util.find_spec
    scene.patch.setattr(util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))


def crossval(then: Callable[[Path], object] = lambda _: None) -> Prepare:
    """A cross-validation that ended, changed."""

    def make(scene: Scene) -> None:
        shutil.copytree(scene.crossval, "CROSSVAL")
        then(Path("CROSSVAL"))

    return make


def exchanged(out: Path) -> None:
    """The network of fold 1 in place of that of fold 0."""
    shutil.rmtree(out / "ensemble" / "fold-0")
    shutil.copytree(out / "ensemble" / "fold-1", out / "ensemble" / "fold-0")


def no_networks(out: Path) -> None:
    """An ensemble.json without its networks."""
    path = out / "ensemble" / "ensemble.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "networks"})
    )


def from_an_ensemble(out: Path) -> None:
    """Started from an ensemble."""
    path = out / "folds.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_from": ["0" * 64, "1" * 64]}))


def cut_answer(out: Path) -> None:
    """The first out-of-fold file cut short."""
    first = min((out / "out-of-fold").iterdir())
    first.write_bytes(first.read_bytes()[:-40])


def as_of_torchrun(scene: Scene) -> None:
    """Environment variables that torchrun sets for a process."""
    scene.patch.setenv("TORCHELASTIC_RUN_ID", "7")
    scene.patch.setenv("WORLD_SIZE", "2")


def port_taken(scene: Scene) -> None:
    """Something else listens where processes would meet."""
    listening = scene.held.enter_context(socket.socket())
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    scene.patch.setenv("MASTER_PORT", str(listening.getsockname()[1]))


def stretched(_: Scene) -> None:
    """A case of another spacing."""
    for path in Path(f"DATA/{CASE}").iterdir():
        stored: Any = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(stored.dataobj), stored.affine @ np.diag([1.5, 1, 1, 1])), path)


def not_writable(_: Scene) -> None:
    """A folder that may be read but not written to."""
    Path("READ-ONLY").mkdir(mode=0o555)


def folder(name: str, content: str | None = None) -> Prepare:
    """A folder, with one file of ``{}`` where it is named."""

    def make(_: Scene) -> None:
        Path(name).mkdir()
        if content is not None:
            Path(name, content).write_text("{}")

    return make


def gone(*names: str) -> Prepare:
    """Take cases away."""
    return lambda _: [shutil.rmtree(f"DATA/{name}") for name in names]


def differing_export() -> Exception:
    """An exported network that is not the one it was made of."""
    from app.errors import RunError
    from app.exporting.parity import Parity

    parity = Parity(
        source="a phantom",
        windows=1,
        largest_difference=0.5,
        mean_difference=0.1,
        largest_logit=10.0,
        label_disagreement=0.01,
    )
    with pytest.raises(RunError) as caught:
        parity.require("RUN as openvino")
    return caught.value


#: What to do about a value of a wrong type.
NUMBER = "Give a value of the type that [the config](reference/config.md) states."
_HEX = {r"\b[0-9a-f]{12,}\b": "0123456789ab"}

#: By topic or command: what a user can meet. docs/errors.md has a row for each.
TABLES: dict[str, list[Shown | Raised]] = {
    "The command line": [
        # an unknown verb or option
        Shown(title="verb", command="znormseg segment DATA", code=2, remedy="`znormseg -h` lists the commands."),
        Shown(
            title="option",
            command="znormseg predict RUN DATA OUT --gpu 0",
            code=2,
            remedy="`znormseg predict -h` lists the options.",
        ),
        # an argument missing
        Shown(command="znormseg train DATA", code=2, remedy="Add the argument; `znormseg train -h` explains it."),
        # options that exclude each other
        Shown(command="znormseg train DATA RUN --resume --fold 1", code=2),
        # `--weights` that are no whole numbers
        Shown(command="znormseg train DATA MORE NEW --weights 3:1", code=2),
    ],
    "Images": [
        # a contrast missing; `predict` with a run trained on complete cases only
        image("missing"),
        # two files for one contrast
        image("two files"),
        unlisted(label("two files")),
        # a contrast missing, and files that are named after none
        Shown(
            title="a file that tells no contrast",
            command=PREDICT,
            code=3,
            prepare=lambda _: Path(IMAGE).rename(IMAGE.replace("_t2.", "_dark.")),
        ),
        # an archive, a web page, a pointer of Git LFS, a DICOM file under the name of a NIfTI file; packed twice
        image_that("a web page", lambda path: path.write_text("<!DOCTYPE html><title>Log in</title>")),
        image_that("packed twice", lambda path: path.write_bytes(gzip.compress(path.read_bytes()))),
        # a name with bytes that are no UTF-8; an id of more bytes than a file's name takes
        Shown(title="no UTF-8", command="znormseg predict RUN DATA OUT", code=6, prepare=renamed_to("caf\udce9")),
        Shown(
            title="too long",
            command="znormseg predict RUN DATA OUT --save-probabilities",
            code=6,
            prepare=renamed_to("x" * 240),
            steady={"x{240}": "x...x"},
        ),
        # 4D, 2D
        image("4D"),
        unlisted(image_that("2D", lambda path: bad.change(path, lambda v: v[:, :, 20]))),
        # a 4D file with fewer volumes than described
        Shown(
            command="znormseg train SET NEW",
            code=3,
            small=True,
            prepare=rendered("MSD", lambda r: bad.change(min((r / "imagesTr").glob("BRATS*")), lambda v: v[..., :3])),
        ),
        # MEN-RT: one contrast, a target of radiotherapy
        Shown(command="znormseg predict RUN MEN-RT OUT", code=3, prepare=radiotherapy),
        # contrasts of different shape or place
        image("other shape"),
        image("other origin"),
        unlisted(image("other slices")),
        # RGB, complex
        image("RGB"),
        unlisted(image("complex")),
        # CIFTI, MGH, other formats
        unlisted(image("CIFTI")),
        image("CIFTI, compressed"),
        # missing, empty, cut short, no gzip, wrong checksum
        unlisted(image("a folder")),
        image("empty"),
        image("cut short"),
        image("not gzip"),
        unlisted(image_that("wrong checksum", flipped)),
        unlisted(label("empty file")),
        # a header that claims more voxels than the file can hold, or more than 1024^3
        image("huge"),
        image("more than there is"),
        # NaN or infinite voxels
        image("NaN"),
        unlisted(image("infinite")),
        # every voxel 0; a mask
        image("all zero"),
        image("a mask"),
        # a head with its skull: more than half of the volume's faces are not 0
        image("skull"),
        # voxels below 0.05 or above 50 mm (an affine in metres or micrometres)
        image("in metres"),
        unlisted(image("in micrometres")),
        # a sheared affine, one that is not invertible
        image("sheared"),
        image_that("not invertible", singular),
        # a link out of the data folder
        image("link out"),
        unlisted(label("link out")),
        Shown(
            title="all cases",
            command="znormseg predict RUN DATA OUT",
            code=3,
            prepare=lambda _: bad.link(Path("DATA").absolute(), "data set"),
        ),
        # a dangling link
        image("dangling link", "Copy the file that the link names, or leave the case out."),
        # a case id with `..`, a slash, a leading dot
        Shown(command="znormseg predict RUN DATA OUT", code=6, prepare=renamed("up..up")),
    ],
    "Label maps": [
        # none for a training case
        label("missing"),
        # values beyond 4
        label("outside the convention"),
        # 3 and 4 in one data set whose names do not reveal the year
        label("3 and 4 together"),
        # values that several conventions have
        Shown(
            command="znormseg train SET NEW",
            code=3,
            small=True,
            prepare=rendered("flat"),
            remedy="Say it with `--labels`.",
        ),
        # values that the convention stated by a description or by `--labels` has not
        Shown(command=f"{TRAIN} --labels msd", code=3, small=True),
        Shown(title="an unknown name", command=f"{TRAIN} --labels brats", code=3, small=True),
        # families with different numbers in one folder
        Shown(
            command="znormseg train SET NEW",
            code=3,
            small=True,
            prepare=both(rendered("2021"), rendered("2024 PED")),
            listed=False,
        ),
        # another grid than the images
        label("another grid"),
        unlisted(label("another shape")),
        # fractions beyond 0.01, negative numbers, NaN
        label("fractions"),
        label("NaN"),
        Shown(
            title="negative numbers",
            listed=False,
            command=TRAIN,
            code=3,
            small=True,
            prepare=change(LABEL, lambda v: np.where(v == 4, -1, v), np.int16),
        ),
    ],
    "Data sets and their descriptions": [
        # a data set that is not there, or holds no case
        Shown(title="not there", command="znormseg data check NOWHERE", code=3, remedy="Check the path."),
        Shown(title="no case", command="znormseg data check EMPTY", code=3, prepare=folder("EMPTY")),
        # several data sets: an id in two of them; synthetic cases of a folder without label maps, or nothing else
        Shown(
            title="an id in two",
            command="znormseg train DATA MORE NEW",
            code=3,
            prepare=lambda _: shutil.copytree(f"DATA/{CASE}", f"MORE/{CASE}"),
        ),
        Shown(command="znormseg train DATA synthetic:UNLABELLED NEW", code=3, prepare=unlabelled),
        Shown(title="nothing but synthetic cases", command="znormseg train synthetic:DATA NEW", code=3, small=True),
        # a split that names other cases
        Shown(
            command=f"{TRAIN} --split split.json",
            code=3,
            small=True,
            prepare=written("split.json", '{"train": ["x"]}'),
            remedy="Name the cases as the data set does.",
        ),
        # a split with one patient in two parts
        Shown(
            command=f"{TRAIN} --split split.json",
            code=3,
            small=True,
            prepare=lambda _: [
                renamed_to("P7_tp1")(_),
                renamed_to("P7_tp2", OTHER)(_),
                Path("split.json").write_text('{"train": ["P7_tp1"], "validation": ["P7_tp2"]}'),
            ],
        ),
        # a dataset.json that is no JSON, or whose channels are not named after contrasts
        Shown(
            title="no JSON",
            command="znormseg data check SET",
            code=3,
            prepare=rendered("MSD", lambda r: (r / "dataset.json").write_text("{")),
        ),
        Shown(
            title="other names",
            command="znormseg data check SET",
            code=3,
            prepare=rendered("nnU-Net", described(channel_names={"0": "A", "1": "B"})),
        ),
        # two channels or two columns for one contrast
        Shown(
            title="channels",
            command="znormseg data check SET",
            code=3,
            prepare=rendered("nnU-Net", described(channel_names={"0": "T2", "1": "T1", "2": "T1w"})),
        ),
        Shown(
            title="columns",
            command="znormseg data check cases.csv",
            code=3,
            prepare=written("cases.csv", "case,t1,t2,T2w\n"),
        ),
        # a CSV without the columns, a row without id, an id twice, no UTF-8
        Shown(
            title="without the columns",
            command="znormseg data check cases.csv",
            code=3,
            prepare=written("cases.csv", "a,b\n1,2\n"),
            remedy="Correct the first row.",
        ),
        Shown(
            title="without id",
            command="znormseg data check cases.csv",
            code=3,
            prepare=written("cases.csv", "case,t1,t1c,t2,flair\n,a,b,c,d\n"),
        ),
        Shown(
            title="an id twice",
            command="znormseg data check cases.csv",
            code=3,
            prepare=written("cases.csv", "case,t1,t1c,t2,flair\nx,a,b,c,d\nx,a,b,c,d\n"),
        ),
        Shown(
            title="no UTF-8",
            command="znormseg data check cases.csv",
            code=3,
            prepare=lambda _: Path("cases.csv").write_bytes(b"case,t1,t1c,t2,flair\n\xff,a,b,c,d\n"),
        ),
        # two manifests in a folder
        Shown(
            command="znormseg data check SET",
            code=3,
            prepare=both(
                folder("SET"),
                *(written(f"SET/{name}.csv", "case,t1,t1c,t2,flair\nx,a,b,c,d\n") for name in "ab"),
            ),
        ),
        # a path of a manifest that is not there, or leads out of its folder
        Shown(
            command="znormseg predict RUN cases.csv OUT",
            code=3,
            prepare=written("cases.csv", f"case,t1,t1c,t2,flair\nx,{IMAGE},{IMAGE},gone.nii.gz,{IMAGE}\n"),
            remedy="Correct the path; it is relative to the manifest.",
        ),
        # `data export`: OUT not empty, or inside of DATA; an unknown format
        Shown(title="not empty", command="znormseg data export DATA RUN --format csv", code=3),
        Shown(title="inside of DATA", command="znormseg data export DATA DATA/OUT --format csv", code=3),
        Shown(title="an unknown format", command="znormseg data export DATA OUT --format bids", code=3),
        # `data export`: contrasts on different grids, NaN where files must be rewritten
        Shown(
            title="grids",
            command="znormseg data export DATA OUT --format msd",
            code=3,
            prepare=lambda _: bad.move(Path(IMAGE), 0, 5),
        ),
        Shown(
            title="NaN",
            command="znormseg data export DATA OUT --format msd",
            code=3,
            prepare=lambda _: bad.hole(np.nan)(Path(IMAGE)),
        ),
    ],
    "`data check`": [
        # swapped contrasts
        found("swapped contrasts", 3, swap, "t2"),
        # another patient
        found("another patient", 3, lambda _: shutil.copy(IMAGE.replace(CASE, OTHER), IMAGE)),
        # same image
        found("same image", 3, lambda _: shutil.copy(IMAGE, IMAGE.replace("t2", "flair"))),
        # same patient
        found("same patient", 0, again, ".*00009: "),
        # visits
        found("visits", 0, lambda _: [renamed_to("P7_tp1")(_), renamed_to("P7_tp2", OTHER)(_)]),
        # possible visits
        found("possible visits", 0, lambda _: [renamed_to("P7_1")(_), renamed_to("P7_2", OTHER)(_)]),
        # skull
        found("skull", 3, skull),
        # background
        found("background", 0, change(IMAGE, lambda v: np.where(v == 0, -1024, v))),
        # rounded labels
        found("rounded labels", 0, change(LABEL, lambda v: v * np.float32(1.002))),
        # label outside the brain
        found("label outside the brain", 3, change(LABEL, lambda v: np.roll(v, 40, axis=0), np.uint8)),
        # misplaced label
        found("misplaced label", 0, labelled_where_dark),
        # cut field of view
        *(
            found("cut field of view", 0, change(IMAGE, lambda v: np.where(np.arange(v.shape[2]) < 26, v, 0)), about)
            for about in ("t2: the brain ends", "t2: 0 in")
        ),
        # thick slices
        found("thick slices", 0, thick, "t2"),
        # empty label map, one-voxel islands, no label map
        found("empty label map", 0, change(LABEL, np.zeros_like, np.uint8)),
        found("one-voxel islands", 0, change(LABEL, island, np.uint8)),
        found("no label map", 0, lambda _: Path(LABEL).unlink()),
    ],
    "`data prepare`, `predict --prepare`": [
        # a contrast that is not of the same head, or damaged
        Shown(
            command=PREPARE,
            code=3,
            prepare=both(smaller, noise),
            steady={r"\d\.\d+ is only \d\.\d+ times": "0.001 is only 0.66 times"},
        ),
        # `--mask mindgrab` without its network, offline
        Shown(command=f"ZNORMSEG_OFFLINE=1 {PREPARE} --mask mindgrab", code=5, prepare=no_models),
        # `--mask hd-bet` or `synthstrip` without the command
        Shown(
            command=f"{PREPARE} --mask hd-bet",
            code=3,
            prepare=lambda scene: scene.patch.setenv("PATH", str(scene.place)),
        ),
        # such a tool fails, or finds no brain
        Shown(
            command=f"{PREPARE} --mask hd-bet",
            code=3,
            prepare=both(smaller, tool("echo 'no weights to be had' >&2; exit 3")),
        ),
        # a mask file that marks nothing of T1c
        Shown(command=f"{PREPARE} --mask MASK.nii.gz", code=3, prepare=both(smaller, mask_elsewhere)),
        # a label map on the grid of no contrast
        Shown(command=PREPARE, code=3, prepare=change(LABEL, lambda v: v[2:], np.uint8)),
        # a prepared image that is no stripped brain (`--mask none`)
        Shown(command=f"{PREDICT} --prepare --mask none", code=3, prepare=both(smaller, heads)),
        # OUT that is a file or not empty
        Shown(title="a file", command=PREPARE, code=3, prepare=written("OUT", "mine")),
        Shown(title="not empty", command=f"znormseg data prepare DATA/{CASE} RUN", code=3),
    ],
    "`data dicom`, `data dicom-seg`": [
        # no DICOM file; nothing there
        Shown(command="znormseg data dicom DATA", code=3),
        Shown(title="nothing there", command="znormseg data dicom NOWHERE", code=3),
        # a file that is empty, cut short, or whose header cannot be read
        Shown(
            title="empty",
            command="znormseg data dicom STUDY",
            code=3,
            prepare=study(lambda root: (root / "S2" / "0003.dcm").write_bytes(b"")),
        ),
        Shown(
            title="cut short",
            listed=False,
            command="znormseg data dicom STUDY",
            code=3,
            prepare=study(
                lambda root: (root / "S2" / "0003.dcm").write_bytes(min((root / "S2").iterdir()).read_bytes()[:-99])
            ),
        ),
        # files of several patients
        Shown(
            command="znormseg data dicom STUDY CASES",
            code=3,
            prepare=study(headers(lambda h: setattr(h, "PatientID", "PID-0815"), "S5")),
        ),
        # several studies
        Shown(
            command="znormseg data dicom STUDY CASES",
            code=3,
            prepare=study(headers(lambda h: setattr(h, "StudyInstanceUID", "1.2.3.4"), "S5")),
        ),
        # two series for a contrast
        Shown(command="znormseg data dicom STUDY CASES", code=3, prepare=study(twice_acquired)),
        # no series for a contrast
        Shown(
            command="znormseg data dicom STUDY CASES",
            code=3,
            prepare=study(lambda root: shutil.rmtree(root / "S3")),
        ),
        # a series chosen that is not there, chosen twice, no MR, or several volumes under one number
        Shown(title="not there", command="znormseg data dicom STUDY CASES --t1 99", code=3, prepare=study()),
        Shown(
            title="chosen twice",
            command="znormseg data dicom STUDY CASES --t1 2 --t2 2",
            code=3,
            prepare=study(),
        ),
        Shown(title="several volumes", command="znormseg data dicom STUDY CASES --t2 4", code=3, prepare=study()),
        # missing slices, two at one place, uneven spacing, a tilted gantry
        Shown(command="znormseg data dicom STUDY CASES", code=3, prepare=study(slice_taken_out)),
        # RescaleSlope or RescaleIntercept in some slices only, or no number
        Shown(
            command="znormseg data dicom STUDY CASES",
            code=3,
            prepare=study(headers(rescaled, "S3", most=11)),
            steady=_HEX,
        ),
        # a Pixel Padding Value that declares every voxel to be padding
        Shown(command="znormseg data dicom STUDY CASES", code=3, prepare=study(headers(all_padding, "S3"))),
        # images without position, orientation or pixel spacing
        Shown(
            command="znormseg data dicom STUDY CASES",
            code=3,
            prepare=study(headers(lambda h: setattr(h, "PixelSpacing", None), "S3")),
        ),
        # voxels compressed in a way nobody here decodes
        Shown(command="znormseg data dicom STUDY CASES", code=3, prepare=study(headers(film, "S3")), steady=_HEX),
        # voxels that cannot be decoded, or are not as many as the header says
        Shown(
            command="znormseg data dicom STUDY CASES",
            code=3,
            prepare=study(headers(lambda h: setattr(h, "BitsAllocated", 8), "S3")),
            steady=_HEX,
        ),
        # an archive with `..` or absolute names, a password, a wrong checksum, or too large
        Shown(title="`..`", command="znormseg data dicom STUDY.zip CASES", code=3, prepare=zipped(locked=False)),
        Shown(title="a password", command="znormseg data dicom STUDY.zip CASES", code=3, prepare=zipped(locked=True)),
        # a case or a SEG that is already there
        Shown(
            title="a case",
            command="znormseg data dicom STUDY CASES --id a",
            code=3,
            prepare=both(study(), lambda _: Path("CASES/a").mkdir(parents=True)),
        ),
        Shown(
            title="a SEG",
            command="znormseg data dicom-seg SEG.nii.gz STUDY OUT.dcm",
            code=3,
            prepare=both(study(), drawn(1), written("OUT.dcm", "mine")),
        ),
        # `dicom-seg`: a label map that is not there, on another grid, or empty
        Shown(
            title="not there",
            command="znormseg data dicom-seg gone.nii.gz STUDY OUT.dcm",
            code=3,
            prepare=study(),
        ),
        Shown(
            title="another grid",
            command=f"znormseg data dicom-seg {LABEL} STUDY OUT.dcm",
            code=3,
            prepare=study(),
        ),
        Shown(
            title="empty",
            command="znormseg data dicom-seg SEG.nii.gz STUDY OUT.dcm",
            code=3,
            prepare=both(study(), drawn(0)),
            remedy="Give the label map of this patient.",
        ),
        # `dicom-seg`: images that share their SOPInstanceUID
        Shown(
            command="znormseg data dicom-seg SEG.nii.gz STUDY OUT.dcm",
            code=3,
            prepare=both(study(headers(lambda h: setattr(h, "SOPInstanceUID", "1.2.3"), "S7")), drawn(1)),
        ),
        # `dicom-seg`: headers without what a SEG must repeat
        Shown(
            command="znormseg data dicom-seg SEG.nii.gz STUDY OUT.dcm",
            code=3,
            prepare=both(study(headers(lambda h: delattr(h, "FrameOfReferenceUID"), "S7")), drawn(1)),
            remedy="Export the study again with these fields, or keep the label map as NIfTI.",
        ),
    ],
    "Config": [
        # `--config` that is no name and no file
        Shown(command=f"{TRAIN} --config labtop", code=4),
        # unknown or mistyped key
        setting("mistyped key"),
        setting("unknown key"),
        setting("unknown section"),
        # more or fewer weights than data sets
        Shown(command="znormseg train DATA MORE NEW --weights 1", code=4),
        # `ZNORMSEG_CACHE_GB` that is no size
        Shown(
            command=f"ZNORMSEG_CACHE_GB=much {TRAIN}",
            code=4,
            small=True,
            remedy="Set the variable to a number such as 200, or unset it.",
        ),
        # text for a number, a number out of range
        setting("text for a number", NUMBER),
        unlisted(setting("fraction for a count", NUMBER)),
        setting("not a number", NUMBER),
        setting("no value", "Write the key, `=` and the value."),
        Shown(
            title="out of range",
            command=f"{TRAIN} --set training.steps=0",
            code=4,
            remedy="Give a value in this range.",
        ),
        # `gradient.znorm` that chooses no tensor of the network, or an output block it has not
        Shown(
            command=f"{TRAIN} --set gradient.znorm.output_block=head",
            code=4,
            small=True,
            remedy="Name a module that the message lists, or `auto`.",
        ),
        # a patch that the network cannot halve often enough
        setting("patch", "Choose such sides, or fewer levels."),
        # not YAML, a key twice, an alias, nested without end
        Shown(
            title="not YAML",
            command=f"{TRAIN} --config c.yaml",
            code=4,
            prepare=written("c.yaml", "data: {\n"),
            remedy="Correct the line; `znormseg config show laptop` prints a valid file.",
        ),
        Shown(
            title="a key twice",
            command=f"{TRAIN} --config c.yaml",
            code=4,
            prepare=written("c.yaml", "data: {}\ndata: {}\n"),
            remedy="Keep the key once.",
        ),
        Shown(
            title="an alias",
            command=f"{TRAIN} --config c.yaml",
            code=4,
            prepare=written("c.yaml", "data: &a {}\nruntime: *a\n"),
            remedy="Write the value out.",
        ),
        Shown(
            title="nested without end",
            command=f"{TRAIN} --config c.yaml",
            code=4,
            prepare=written("c.yaml", "[" * 5000),
            remedy="Check the brackets; `znormseg config show laptop` prints a valid file.",
        ),
        # `network.deep_supervision` or `network.blocks` for a network without; not one number of blocks a level
        Shown(command=f"{TRAIN} --set network.deep_supervision=true", code=4),
    ],
    "`train` and `torchrun`": [
        # `train --resume`: label maps that have changed since the run began
        Shown(
            command="znormseg train DATA RUN --resume",
            code=3,
            prepare=whole_data(bad.relabel(2, 1)),
        ),
        # `train --resume` with other data sets
        Shown(
            title="other data sets",
            command="znormseg train DATA synthetic:DATA RUN --resume",
            code=3,
            prepare=whole_data(lambda _: None),
            steady={r"\(/[^)]*\)": "(DATA)"},
        ),
        # `train --resume` with as many data sets, but others
        Shown(
            title="another data set",
            command="znormseg train synthetic:DATA RUN --resume --set training.steps=9",
            code=3,
            prepare=whole_data(lambda _: None),
        ),
        # a split that uses no case of a data set for training, or synthetic ones for validation
        Shown(
            title="weights of a data set that does not train",
            command="znormseg train DATA synthetic:DATA NEW --split split.json --weights 3,1",
            code=3,
            small=True,
            prepare=written("split.json", f'{{"train": ["{CASE}"], "validation": ["{OTHER}"]}}'),
        ),
        Shown(
            title="a data set that is not in the split",
            command="znormseg train DATA synthetic:DATA NEW --split split.json",
            code=3,
            small=True,
            prepare=written("split.json", f'{{"train": ["{CASE}"], "validation": ["{OTHER}"]}}'),
        ),
        Shown(
            title="synthetic cases for validation",
            command="znormseg train DATA synthetic:DATA NEW --split split.json",
            code=3,
            small=True,
            prepare=written("split.json", f'{{"train": ["{CASE}"], "validation": ["synthetic-{OTHER}"]}}'),
        ),
        # nothing but synthetic cases; `synthetic:` without a data set
        Shown(title="only synthetic cases", command="znormseg train synthetic:DATA NEW", code=3),
        Shown(title="`synthetic:` alone", command="znormseg train synthetic: DATA NEW", code=3),
        # `--weights` and `--set data.weights`
        Shown(
            command="znormseg train DATA MORE NEW --weights 3,1 --set data.weights=[1,1]",
            code=2,
            remedy="Leave out one of them.",
        ),
        # `training.patience` without validation cases
        Shown(command=f"{TRAIN} --fold all --set training.patience=3", code=4, small=True),
        # `--init-from` with another network, or other input channels
        Shown(title="another network", command=f"{TRAIN} --init-from RUN --config resunet", code=4),
        Shown(
            title="other channels",
            command=f"{TRAIN} --init-from RUN --set augment.contrast_dropout=0.5",
            code=4,
            small=True,
        ),
        # `--init-from` with what is no run
        Shown(command=f"{TRAIN} --init-from DATA", code=5, small=True),
        Shown(command=f"{TRAIN} --init-from CROSSVAL/ensemble", code=5, small=True, prepare=crossval()),
        # `train --resume` with another config
        Shown(command="znormseg train DATA RUN --resume --set training.learning_rate=1", code=4),
        # losses that are not finite, more than `training.max_rollbacks` times
        Shown(
            command=f"{TRAIN} --set training.steps=40 --set training.learning_rate=100 --set "
            "training.weight_decay=1 --set runtime.precision=float32 --set training.max_rollbacks=1",
            code=5,
            small=True,
        ),
        # RUN in use by another process, not empty, nothing to resume
        Shown(title="in use", command="znormseg train DATA RUN --resume", code=5, prepare=in_use),
        Shown(title="not empty", command="znormseg train DATA RUN", code=5, small=True),
        Shown(title="nothing to resume", command=f"{TRAIN} --resume", code=5),
        # prepared cases that are removed or damaged while a run uses them
        Shown(command=TRAIN, code=3, small=True, prepare=cache_goes, steady={r"BraTS2021_0000\d": CASE, **_HEX}),
        # `train` with `inference.crop: false`
        Shown(command=f"{TRAIN} --set inference.crop=false", code=4, small=True, remedy="Leave it out."),
        # `torchrun`: more processes than GPUs, or one GPU for several
        Shown(
            title="one GPU for several",
            command=f"{TORCHRUN} train DATA NEW --set runtime.device=cuda:0",
            code=1,
            before=list,
            only="takes its own GPU",
        ),
        # `torchrun`: a process that ended, cannot be reached, or has another torch, device or precision
        Shown(
            title="cannot be reached",
            command=f"MASTER_ADDR=127.0.0.1 RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 {TRAIN}",
            code=7,
            prepare=port_taken,
            steady={r"127\.0\.0\.1:\d+ \(.*\)(?=\. Hosts)": "127.0.0.1:29507 (address already in use)"},
        ),
        # `torchrun` with another command than `train`
        Shown(
            command=f"{TORCHRUN} predict RUN DATA OUT",
            code=2,
            prepare=as_of_torchrun,
            remedy="Start it without torchrun.",
        ),
    ],
    "Presence": [
        Shown(command=f"{PRESENCE} --set task.outputs=[grade]", code=3, prepare=labels("case,ET")),
        Shown(command=PRESENCE, code=3, prepare=labels("case,ET", f"{CASE},1", "BraTS2021_00002,0")),
        Shown(command=PRESENCE, code=3, prepare=labels(*ALL_LABELLED, "nobody,1")),
        Shown(command=PRESENCE, code=3, prepare=labels("case,ET", f"{CASE},2")),
        # all three phantoms have enhancing tumour
        Shown(command="znormseg train DATA NEW --config presence", code=3, small=False),
        Shown(command="znormseg train DATA NEW --config presence --set network.architecture=unet", code=4),
        Shown(command="znormseg compare DATA OUT --config presence --set task.labels_csv=labels.csv", code=4),
        Shown(command=f"{PREDICT} --presence RUN", code=5),
        Shown(command=f"{PREDICT} --presence starter", code=5),
    ],
    "Runs and their weights": [
        # RUN that does not exist, is a file, is none, has no weights
        run("not there"),
        run("a file"),
        Shown(title="a data set", command=f"znormseg predict DATA DATA/{CASE} OUT", code=5),
        run("without weights"),
        # weights that are not those that were saved (SHA-256), or pickled, and no earlier ones
        run("a changed bit"),
        run("a pickle"),
        unlisted(run("no digest")),
        run("another version"),
        run("other contrasts", "Use a run that was trained on the four contrasts and three regions of this program."),
        # missing contrasts: weights and config disagree; a run that needs all four
        Shown(
            title="they disagree",
            listed=False,
            command=PREDICT,
            code=5,
            prepare=lambda _: bad.rewrite('"takes_missing_contrasts": false', '"takes_missing_contrasts": true')(
                Path("RUN").absolute()
            ),
        ),
        Shown(title="subsets", command="znormseg contrasts RUN DATA --cases all", code=5),
        # `predict` with the folder of a cross-validation
        Shown(
            command=f"znormseg predict CROSSVAL DATA/{CASE} OUT",
            code=5,
            prepare=crossval(),
        ),
        Shown(
            title="not done",
            command=f"znormseg predict CROSSVAL DATA/{CASE} OUT",
            code=5,
            prepare=folder("CROSSVAL", "folds.json"),
        ),
        # an ensemble whose weights or description are missing or damaged
        Shown(
            title="weights missing",
            command=f"znormseg predict CROSSVAL/ensemble DATA/{CASE} OUT",
            code=5,
            prepare=crossval(lambda out: shutil.rmtree(out / "ensemble" / "fold-1")),
        ),
        Shown(
            title="a damaged description",
            command=f"znormseg predict CROSSVAL/ensemble DATA/{CASE} OUT",
            code=5,
            prepare=crossval(lambda out: (out / "ensemble" / "ensemble.json").write_text("{}")),
        ),
    ],
    "`predict`": [
        # `predict`: OUTPUT that is INPUT, a case's folder or the run
        Shown(title="INPUT", command="znormseg predict RUN DATA DATA", code=3),
        Shown(title="the run", command="znormseg predict RUN DATA RUN", code=3),
        # OUTPUT that is a file
        Shown(command=PREDICT, code=3, prepare=written("OUT", "mine")),
        # a case whose process is lost three times
        Shown(
            command=f"{PREDICT} --workers 2",
            code=3,
            prepare=killed_at("app.inference.batch.parallel", f"{CASE}_t2."),
            remedy="Look for the cause in the system's log (often too little memory); use fewer `--workers`.",
        ),
        # `--engine`, `--workers`, `--devices` that cannot be
        Shown(title="workers", command=f"{PREDICT} --workers 0", code=4, remedy="Give a number in this range."),
        Shown(title="devices", command=f"{PREDICT} --devices tpu", code=4, remedy="Give such a list."),
        Shown(title="without Ray", command=f"{PREDICT} --engine ray", code=4, prepare=without("ray")),
        # `predict --devices`: GPUs that are not there
        Shown(command=f"CUDA_VISIBLE_DEVICES= {PREDICT} --devices cuda:0,cuda:1", code=7),
        # a case named `manifest`
        Shown(command="znormseg predict RUN DATA OUT", code=6, prepare=renamed("manifest")),
    ],
    "`evaluate`, `contrasts` and `rank`": [
        # `evaluate`: a folder without label maps
        Shown(command="znormseg evaluate OUT DATA", code=3, prepare=folder("OUT")),
        # `evaluate`: prediction and reference on different grids (6)
        Shown(command="znormseg evaluate OUT DATA", code=3, prepare=predictions(lambda path: bad.move(path, 1, 2))),
        # `evaluate --resample`: no voxel in common (6)
        Shown(
            command="znormseg evaluate OUT DATA --resample",
            code=3,
            prepare=predictions(lambda path: bad.move(path, 1, 999)),
        ),
        # `evaluate --rules`: no such year, or a task that the year has not
        Shown(command="znormseg evaluate OUT DATA --rules brats2022", code=3, prepare=predictions()),
        Shown(
            title="task",
            command="znormseg evaluate OUT DATA --rules brats2023 --task MEN-RT",
            code=3,
            prepare=predictions(),
        ),
        # `evaluate --rules`: another grid, more than 0 and 1 in MEN-RT (6)
        Shown(
            title="another grid",
            command="znormseg evaluate OUT DATA --rules brats2023",
            code=3,
            prepare=predictions(lambda path: bad.move(path, 1, 2)),
        ),
        Shown(
            title="MEN-RT",
            command="znormseg evaluate OUT DATA --rules brats2024 --task MEN-RT",
            code=3,
            prepare=predictions(),
        ),
        # `--rules brats2026` without `brats-evaluate` (7)
        Shown(
            command="znormseg evaluate OUT DATA --rules brats2026",
            code=7,
            prepare=both(predictions(), lambda scene: scene.patch.setenv("PATH", str(scene.place))),
        ),
        # `--rules brats2026`: `brats-evaluate` crashes, hangs, refuses a case or writes something else (6)
        Shown(
            title="one case alone",
            command="znormseg evaluate OUT DATA --rules brats2026 --task GOAT -q",
            code=3,
            prepare=both(predictions(), tool("echo 'MemoryError: no room' >&2; exit 1", name="brats-evaluate")),
            only="^znormseg: none of",
        ),
        # `--rules brats2026`: a tissue that the task has no number for (6)
        Shown(
            command="znormseg evaluate OUT DATA --rules brats2026 --task MEN-RT -q",
            code=3,
            prepare=both(predictions(), tool("exit 1", name="brats-evaluate")),
            only="^znormseg: none of",
        ),
        # `rank`: sets scored by different rules
        Shown(command="znormseg rank one.json other.json", code=3, prepare=both(predictions(), by_two_rules)),
        # `rank`: no common case, region or metric; one set alone or twice; no references; no table of `evaluate`
        Shown(
            title="no common case",
            command="znormseg rank OUT OTHER --references DATA",
            code=3,
            prepare=two_sets(OTHER),
        ),
        Shown(
            title="no such metric",
            command="znormseg rank OUT OTHER --references DATA --metrics speed",
            code=3,
            prepare=two_sets(),
        ),
        Shown(title="one alone", command="znormseg rank OUT --references DATA", code=3, prepare=predictions()),
        Shown(
            title="the same twice",
            command="znormseg rank OUT OUT --references DATA",
            code=3,
            prepare=predictions(),
        ),
        Shown(title="no references", command="znormseg rank OUT OTHER", code=3, prepare=two_sets()),
        Shown(
            title="no table",
            command="znormseg rank OUT notes.csv --references DATA",
            code=3,
            prepare=both(predictions(), written("notes.csv", "a,b\n1,2\n")),
        ),
        # `<case>_probabilities.nii.gz` that is not 4D
        Shown(
            command="znormseg evaluate OUT DATA",
            code=3,
            prepare=predictions(lambda p: shutil.copy(p, p.with_name(f"{CASE}_probabilities.nii.gz"))),
        ),
        # `contrasts`: no labelled case that the run has not trained on
        Shown(command="znormseg contrasts RUN DATA", code=3),
    ],
    "`compare`, `crossval` and `report`": [
        # `compare`: fewer than three patients
        Shown(command="znormseg compare DATA OUT", code=3, prepare=gone(OTHER)),
        # `compare`: unknown arm, optimiser or rate; another plan in OUT
        Shown(title="arm", command="znormseg compare DATA OUT --arms none,best", code=4),
        Shown(title="optimiser", command="znormseg compare DATA OUT --optimizers adam", code=4),
        Shown(
            title="rate", command="znormseg compare DATA OUT --learning-rates fast", code=4, remedy="Give such numbers."
        ),
        # `crossval`: fewer patients than folds; cases or label maps other than those it was begun with
        Shown(title="fewer patients", command="znormseg crossval DATA OUT --folds 5", code=3, small=True),
        Shown(title="other cases", command=CROSSVAL, code=3, small=True, prepare=both(crossval(), gone(OTHER))),
        # `crossval`: other settings than those it was begun with; `--folds`, `--devices`, `--jobs` that cannot be
        Shown(
            title="other settings",
            command=f"{CROSSVAL} --set training.steps=5",
            code=4,
            small=True,
            prepare=crossval(),
        ),
        Shown(
            title="folds",
            command="znormseg crossval DATA OUT --folds 1",
            code=4,
            small=True,
            remedy="Give a number in this range.",
        ),
        Shown(title="devices", command=f"{CROSSVAL} --devices gpu0", code=4, remedy="Give such a list."),
        Shown(title="jobs", command=f"{CROSSVAL} --jobs 0", code=4, remedy="Give a number in this range."),
        # `crossval`: nothing but synthetic cases
        Shown(title="only synthetic cases", command="znormseg crossval synthetic:DATA OUT", code=3),
        # `crossval --init-from`: no ensemble, of other cases or another number of folds, networks that cannot be used
        Shown(title="a run", command="znormseg crossval DATA OUT --init-from RUN", code=5),
        Shown(
            title="other cases of the ensemble",
            command=FURTHER,
            code=3,
            small=True,
            prepare=both(crossval(), gone(OTHER)),
        ),
        Shown(title="another number of folds", command=f"{FURTHER} --folds 3", code=4, small=True, prepare=crossval()),
        Shown(title="another network", command=f"{FURTHER} --config resunet", code=4, prepare=crossval()),
        Shown(title="exchanged weights", command=FURTHER, code=5, small=True, prepare=crossval(exchanged)),
        Shown(title="damaged", command=FURTHER, code=5, small=True, prepare=crossval(no_networks)),
        # `crossval`: resumed with another ensemble, or with none
        Shown(title="no ensemble", command=CROSSVAL, code=4, small=True, prepare=crossval(from_an_ensemble)),
        # `crossval`: cases of different spacings and `data.spacing_mm` open
        Shown(command=CROSSVAL, code=4, small=True, prepare=both(stretched, gone(OTHER))),
        # an out-of-fold file that is damaged
        Shown(command="znormseg report CROSSVAL PAGES", code=5, prepare=crossval(cut_answer)),
        # `crossval`: a worker process that is killed
        Shown(
            command=f"{CROSSVAL} --jobs 2",
            code=7,
            small=True,
            prepare=killed_at("app.experiments.crossval.workers", "fold-1/run.json"),
        ),
        # a folder that has no page, or not yet
        Shown(title="none of these", command="znormseg report DATA PAGES", code=5),
        Shown(
            title="an ensemble",
            command="znormseg report CROSSVAL/ensemble PAGES",
            code=5,
            prepare=crossval(),
        ),
        Shown(
            title="not ended",
            command="znormseg report CROSSVAL PAGES",
            code=5,
            prepare=crossval(lambda out: (out / "crossval.json").unlink()),
        ),
        Shown(
            title="damaged",
            command="znormseg report COMPARISON PAGES",
            code=5,
            prepare=folder("COMPARISON", "plan.json"),
            remedy="Restore the folder from a copy.",
        ),
        # `report --images` or `--references` of something else than predictions
        Shown(
            command="znormseg report RUN PAGES --references DATA",
            code=4,
            remedy="Leave out the option, or give a folder of predictions.",
        ),
        # `report`: no case can be shown; 6 where some can
        Shown(command="znormseg report OUT PAGES", code=3, prepare=predictions(record=True)),
    ],
    "`plan`, `doctor`, `export` and `model`": [
        # `plan --dry-run`: nothing fits into memory
        Shown(
            command="znormseg plan DATA --dry-run --max-memory-gb 0.1",
            code=7,
            small=True,
            steady={r"\d+(\.\d+)? GB": "0.1 GB"},
        ),
        # `plan --out`: a file that is there, a name that does not end in .yaml
        Shown(
            title="is there",
            command="znormseg plan DATA --out plan.yaml",
            code=4,
            prepare=written("plan.yaml", ""),
        ),
        Shown(title="its name", command="znormseg plan DATA --out plan", code=4, remedy="Choose such a name."),
        # `doctor`: a problem
        Shown(
            command="znormseg doctor DISK",
            code=7,
            prepare=folder("DISK"),
            before=on_a_small_disk(8),
            possible=can_mount,
            only="DISK|free some space",
        ),
        # `export`: an ensemble, or a network that the format has not
        Shown(command="znormseg export CROSSVAL/ensemble OUT --format openvino", code=5, prepare=crossval()),
        # `export`: the exported network differs
        Raised(error=differing_export, remedy="Please report it, with the run's `config.yaml`."),
        # `export --format onnx` without its packages
        Shown(command="znormseg export RUN OUT --format onnx", code=4, prepare=without_onnx),
        # `model import`: another bundle, weights that are more than tensors
        Shown(command="znormseg model import RUN MODEL", code=5),
        # published models: weights missing, offline, an unknown name, another task, files that differ
        Shown(command=f"ZNORMSEG_OFFLINE=1 znormseg predict monai-brats DATA/{CASE} OUT", code=5, prepare=no_models),
        Shown(command=f"znormseg predict starter DATA/{CASE} OUT", code=5, prepare=without_shipped_models),
        Shown(command="znormseg model download starter --from model.pt", code=5, remedy="Leave out `--from`."),
        Shown(command="znormseg model download monai", code=5, prepare=no_models),
        Shown(command=f"znormseg predict mindgrab DATA/{CASE} OUT", code=5, prepare=no_models),
        Shown(
            command="znormseg model download monai-brats --from model.pt",
            code=5,
            prepare=both(no_models, written("model.pt", "")),
            remedy="Download it again, from the address that `model list --json` shows.",
        ),
        Shown(
            command="znormseg model download mindgrab --from model.bin",
            code=5,
            prepare=both(no_models, written("model.bin", "")),
        ),
        # its installed files have changed
        Shown(
            command=f"{PREPARE} --mask mindgrab",
            code=5,
            prepare=both(no_models, folder("MODELS"), folder("MODELS/mindgrab")),
        ),
        # `model verify`: a file missing or changed, no sums
        Shown(title="changed", command="znormseg model verify RUN", code=5, prepare=written("RUN/split.json", "{}")),
        Shown(
            title="no sums",
            command="znormseg model verify RUN",
            code=5,
            prepare=lambda _: Path("RUN/SHA256SUMS").unlink(),
        ),
    ],
    "`serve` and `remote`": [
        # no model
        Shown(command="znormseg serve --data SERVICE", code=2, remedy="Name a model."),
        # a model that is not there; two of one name
        Shown(title="misspelt", command="znormseg serve --data SERVICE --model startr", code=5),
        Shown(title="no folder", command="znormseg serve --data SERVICE --model ./RUNS/1", code=5),
        Shown(title="two of one name", command=f"{SERVE} --model DATA/../RUN", code=2),
        # an address that is in use, or not of this machine
        Shown(title="in use", command=f"{SERVE} --port {PORT}", code=7, prepare=listening, possible=port_is_free),
        Shown(title="not of this machine", command=f"{SERVE} --host 192.0.2.1", code=7),
        # a certificate without its key, and files that are none
        Shown(title="no key", command=f"{SERVE} --tls-cert cert.pem", code=4, remedy="Give both."),
        Shown(title="not there", command=f"{SERVE} --tls-cert cert.pem --tls-key key.pem", code=4),
        Shown(
            title="not PEM",
            command=f"{SERVE} --tls-cert notes.txt --tls-key notes.txt",
            code=4,
            prepare=written("notes.txt", "mine"),
        ),
        # a data folder that cannot be written, or is none
        Shown(
            title="no permission",
            command="znormseg serve --data READ-ONLY/SERVICE --model RUN",
            code=7,
            prepare=not_writable,
            before=lambda: hostile.UNPRIVILEGED,
            possible=can_be_kept_out,
        ),
        Shown(
            title="a file",
            command="znormseg serve --data notes.txt --model RUN",
            code=7,
            prepare=written("notes.txt", "mine"),
        ),
        # a second service on a folder
        Shown(title="second", command=SERVE, code=5, prepare=second_service),
        # a database of a newer version, or damaged; an address of a database that is none
        Shown(title="newer", command=SERVE, code=5, prepare=newer_database),
        Shown(
            title="damaged", command=SERVE, code=5, prepare=no_database, remedy="Restore the data folder from a backup."
        ),
        Shown(title="MySQL", command=f"{SERVE} --database mysql://host/name", code=4, remedy="Give such an address."),
        # an inbox that is not there, or contains the data folder
        Shown(title="no inbox", command=f"{SERVE} --inbox IN", code=4),
        Shown(title="all", command=f"{SERVE} --inbox .", code=4),
        # users and tokens: a name that exists or does not, a short password
        Shown(
            title="exists",
            command="znormseg serve user add ann --data SERVICE",
            code=4,
            prepare=both(with_a_user, password("correct horse battery")),
        ),
        Shown(
            title="short",
            command="znormseg serve user add ben --data SERVICE",
            code=4,
            prepare=password("secret"),
        ),
        Shown(
            title="a name with a space",
            command="znormseg serve user add 'ann b' --data SERVICE",
            code=4,
            remedy="Give such a name.",
            prepare=password("correct horse battery"),
        ),
        Shown(title="nobody", command="znormseg serve token add ben --data SERVICE", code=4, prepare=with_a_user),
        Shown(
            title="no token",
            command="znormseg serve token revoke x --data SERVICE",
            code=4,
            prepare=with_a_user,
            remedy="Give the token, or the part of it between the underscores.",
        ),
        # `remote`: no token, a file that is not there or has none, a token that the service does not know
        Shown(
            title="none",
            command=f"ZNORMSEG_TOKEN= znormseg remote status {URL}",
            code=4,
            remedy="`znormseg serve token add` prints a token.",
        ),
        remote(f"status {URL}", code=7, title="not there"),
        remote(f"status {URL}", token("two words"), code=4, title="no token"),
        remote(f"status {URL}", live(), token("zns_0"), code=5, title="unknown"),
        # `remote`: an address that is none, a service that does not answer, another server
        remote("status segment.example.org", token("x"), code=4, title="no scheme"),
        remote(f"status {URL}", token("x"), patience_of_one, code=7, title="away"),
        remote(f"status {URL}/pages", live(), token(), code=5, title="a path"),
        # `remote`: a certificate that is not trusted, a server without TLS
        replace(
            remote(f"status https://127.0.0.1:{PORT}", live(tls=True), token(), code=7, title="not trusted"),
            possible=lambda: port_is_free() and shutil.which("openssl") is not None,
        ),
        remote(f"status https://127.0.0.1:{PORT}", live(), token(), code=7, title="no TLS"),
        # `remote`: images that are not there or that the service refuses, a job that is not there, another model
        remote(f"submit {URL} CASES", token("x"), code=3, title="no images", remedy="Check the path."),
        remote(f"submit {URL} notes.txt", live(), token(), written("notes.txt", "mine"), code=3, title="refused"),
        remote(f"submit {URL} DATA/{CASE} --model best", live(), token(), code=5, title="no model"),
        remote(f"fetch {URL} {'0' * 32} OUT", live(), token(), code=5, title="no job", remedy="List your jobs."),
    ],
    "The machine, and interruptions": [
        # a disk that is full, a folder that may not be written to
        Shown(
            title="a full disk",
            command="znormseg predict RUN DATA DISK",
            code=7,
            prepare=folder("DISK"),
            before=on_a_small_disk(8),
            possible=can_mount,
            steady={r"BraTS2021_0000\d": CASE},
        ),
        Shown(
            title="no permission",
            command="znormseg predict RUN DATA READ-ONLY",
            code=7,
            prepare=not_writable,
            before=lambda: hostile.UNPRIVILEGED,
            possible=can_be_kept_out,
        ),
        # a system call that fails
        Shown(
            title="a disk that fails",
            command=TRAIN,
            code=7,
            small=True,
            prepare=site(refusing("os", "fsync", "EIO")),
            before=list,
        ),
        Shown(
            title="a file in use on a shared folder",
            command=PREDICT,
            code=7,
            prepare=site(refusing("os", "replace", "EBUSY")),
            before=list,
        ),
        # a file system without locks, sync of folders or memory maps, as network and shared folders
        Shown(
            title="no sync of folders",
            command=TRAIN,
            code=0,
            small=True,
            prepare=site(refusing("os", "fsync", "EINVAL", "stat.S_ISDIR(os.fstat(a[0]).st_mode)")),
            before=list,
            only="its file system cannot",
        ),
        Shown(
            title="no locks",
            command=TRAIN,
            code=0,
            small=True,
            prepare=site(refusing("fcntl", "flock", "ENOSYS")),
            before=list,
            only="its file system cannot",
        ),
        Raised(error=lambda: RuntimeError("cumsum_cuda does not have a deterministic implementation")),
        Raised(error=MemoryError),
        # a cache folder that cannot be used, or is full
        Shown(
            command=f"ZNORMSEG_CACHE=notes.txt {TRAIN}",
            code=0,
            small=True,
            prepare=written("notes.txt", "mine"),
            only="the cache cannot be used",
        ),
        # a device that is not there, no memory left
        Shown(
            command=f"CUDA_VISIBLE_DEVICES= {PREDICT} --device cuda:1",
            code=7,
            steady={"this torch is built without CUDA": "no CUDA device is visible"},
        ),
        # OpenVINO asked for where AVX2 is missing or switched off, or its bfloat16 without AVX-512
        Shown(command=f"ONEDNN_MAX_CPU_ISA=SSE41 {PREDICT} --backend openvino", code=7),
        # Ctrl-C, SIGTERM, SIGHUP (a closed terminal or connection; not under `nohup`)
        Shown(title="SIGTERM while it trains", command=TRAIN, code=130, small=True, prepare=stopped_in_step(2)),
        Shown(
            title="SIGHUP while it trains",
            listed=False,
            command=TRAIN,
            code=130,
            small=True,
            prepare=stopped_in_step(2, signal.SIGHUP),
        ),
        Shown(
            title="Ctrl-C while it predicts",
            command="znormseg predict RUN DATA OUT",
            code=130,
            prepare=stopped_while_predicting,
        ),
    ],
}
