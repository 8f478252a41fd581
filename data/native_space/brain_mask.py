"""Find the brain: from the image's own background, a given file, an installed program, or the MNI152 template.

HD-BET (Isensee et al., Human Brain Mapping 40, 4952, 2019) and SynthStrip (Hoopes et al., NeuroImage 260, 119474, 2022)
are run through the commands they install; neither is part of this program. The template's mask, mapped by an affine
registration, is coarse: it has the shape of an average brain.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from data.errors import DataError
from data.native_space.itk import grid_of, resampled, to_itk, voxels_of
from data.native_space.rigid import register_template
from data.nifti import Volume, read_volume
from data.preprocess import image_problem

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

MaskSource = Literal["own", "file", "hd-bet", "synthstrip", "atlas", "none"]

#: Values of ``--mask`` that do not stand for a file.
MASK_WORDS: Final = ("auto", "hd-bet", "synthstrip", "atlas", "none")
#: The command installed by each tool, in the order in which ``auto`` tries them.
COMMANDS: Final[Mapping[Literal["hd-bet", "synthstrip"], str]] = {"hd-bet": "hd-bet", "synthstrip": "mri_synthstrip"}
#: Plausible volume of a brain with its fluid; a head with its skull, or a part of a brain, lies outside this range.
BRAIN_LITRES: Final = (0.7, 2.2)


@dataclass(frozen=True, kw_only=True)
class BrainMask:
    """A brain mask and its origin."""

    mask: sitk.Image | None
    """uint8, 1 in the brain, on the requested grid; None if nothing is to be masked."""
    source: MaskSource
    coarse: bool = False
    """Whether the mask has the shape of an average brain."""
    detail: str = ""
    """Command, file or measure that produced the mask."""
    warnings: tuple[str, ...] = ()


def is_stripped(image: sitk.Image) -> bool:
    """Whether an image is a brain on a background of 0, judged by its volume and the voxels on the image's faces.

    Args:
        image: one contrast on its own grid.
    """
    voxels = voxels_of(image)
    if image_problem(voxels) is not None:
        return False
    litres = float(np.count_nonzero(voxels)) * float(np.prod(image.GetSpacing())) / 1e6
    return BRAIN_LITRES[0] <= litres <= BRAIN_LITRES[1]


def require_mask(wanted: str) -> None:
    """Check that a mask source is available before time is spent on earlier steps.

    Raises:
        DataError: the tool is not installed, or the value is neither one of :data:`MASK_WORDS` nor a file.
    """
    if wanted == "hd-bet":
        _require("hd-bet")
    elif wanted == "synthstrip":
        _require("synthstrip")
    elif wanted not in MASK_WORDS and not Path(wanted).exists():
        raise DataError(f"--mask {wanted}: no such file, and none of {', '.join(MASK_WORDS)}")


def find_brain(image: sitk.Image, native: sitk.Image, wanted: str, *, name: str) -> BrainMask:
    """Find the brain voxels of an image.

    Args:
        image: T1c, float32, on the grid of the requested mask.
        native: the same contrast on its own grid, in the same world; used to check whether it is skull-stripped.
        wanted: one of :data:`MASK_WORDS`, or the path of a mask in the world of ``image``. ``auto`` tries, in this
            order, the image's own background of 0, HD-BET, SynthStrip, the template.
        name: name of the case, for messages.

    Raises:
        DataError: a requested tool is not installed or fails, a mask is unreadable or empty in this image, or the
            template cannot be registered.
    """
    if wanted == "none":
        return BrainMask(mask=None, source="none", detail="nothing masked, as asked for")
    if wanted == "auto":
        if is_stripped(native):
            return _own(native, image)
        installed = [tool for tool, command in COMMANDS.items() if shutil.which(command)]
        wanted = installed[0] if installed else "atlas"
    if wanted == "hd-bet":
        return _from_hd_bet(image, name)
    if wanted == "synthstrip":
        return _from_synthstrip(image, name)
    if wanted == "atlas":
        return _from_template(image, name)
    return _from_file(Path(wanted), image, name)


def _own(native: sitk.Image, image: sitk.Image) -> BrainMask:
    """Mask of the non-zero voxels, with holes filled."""
    inside = (native != 0) * 1
    mask = _binary(resampled(_shares(inside), grid_of(image)))
    return BrainMask(mask=_filled(mask), source="own", detail="t1c is skull-stripped: its background is 0")


def _from_file(path: Path, image: sitk.Image, name: str) -> BrainMask:
    volume = read_volume(path)
    marked = Volume(voxels=(volume.voxels > 0.5).astype(np.float32), affine=volume.affine, path=path)
    mask = _binary(resampled(to_itk(marked), grid_of(image)))
    if not voxels_of(mask).any():
        raise DataError(
            f"case {name}: {path} marks no voxel of t1c. A mask is above 0.5 in the brain and lies in the world of t1c."
        )
    return BrainMask(mask=mask, source="file", detail=str(path))


def _from_hd_bet(image: sitk.Image, name: str) -> BrainMask:
    """Mask of the voxels HD-BET keeps: its versions name the mask file differently, but not the stripped image."""
    command = _require("hd-bet")
    with tempfile.TemporaryDirectory(prefix="znormseg-") as folder:
        source, target = Path(folder) / "t1c.nii.gz", Path(folder) / "brain.nii.gz"
        _write(image, source)
        device = [] if Path("/dev/nvidiactl").exists() else ["-device", "cpu"]
        arguments = [command, "-i", str(source), "-o", str(target), *device]
        mask = _mask_made(arguments, target, image, name)
    return BrainMask(mask=_filled(mask), source="hd-bet", detail=" ".join(["hd-bet", *device]))


def _from_synthstrip(image: sitk.Image, name: str) -> BrainMask:
    command = _require("synthstrip")
    with tempfile.TemporaryDirectory(prefix="znormseg-") as folder:
        source, target = Path(folder) / "t1c.nii.gz", Path(folder) / "mask.nii.gz"
        _write(image, source)
        mask = _mask_made([command, "-i", str(source), "-m", str(target)], target, image, name)
    return BrainMask(mask=mask, source="synthstrip", detail=COMMANDS["synthstrip"])


def _from_template(image: sitk.Image, name: str) -> BrainMask:
    """The MNI152 brain mask shipped with nilearn, registered to the image."""
    from data.phantoms.template import load_anatomy

    anatomy = load_anatomy(2)
    affine = np.diag([anatomy.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = anatomy.origin_mm
    maps = anatomy.maps
    fluid = np.clip(1 - maps["grey"] - maps["white"], 0, 1)
    # T1 brightness of the tissues as in data.phantoms.template, whose detail map is the template's residual.
    brightness = 0.87 * maps["white"] + 0.65 * maps["grey"] + 0.28 * fluid + maps["detail"]
    brain = maps["brain"] > 0
    template = Volume(voxels=np.where(brain, brightness, 0).astype(np.float32), affine=affine, path=Path("MNI152"))
    marked = to_itk(Volume(voxels=brain.astype(np.float32), affine=affine, path=Path("MNI152")))
    try:
        found = register_template(to_itk(template), marked, image, name="t1c")
    except DataError as error:
        raise DataError(f"case {name}: {error}") from error
    return BrainMask(
        mask=_binary(resampled(marked, grid_of(image), found.transform.GetInverse())),
        source="atlas",
        coarse=True,
        detail=f"MNI152 by affine registration, mutual information {found.metric_after:.4f}",
        warnings=(
            "the brain mask is coarse: the MNI152 template's, laid on this head. Install HD-BET or SynthStrip, or give "
            "a mask, for a better one",
        ),
    )


def _require(tool: Literal["hd-bet", "synthstrip"]) -> str:
    """Path of a tool's command; a DataError if it is not installed."""
    found = shutil.which(COMMANDS[tool])
    if found is None:
        raise DataError(
            f"--mask {tool}: no command {COMMANDS[tool]} on the PATH. Install it, or take --mask auto, atlas or a file."
        )
    return found


def _mask_made(arguments: list[str], made: Path, image: sitk.Image, name: str) -> sitk.Image:
    """Run a tool on an image's file and read its mask, resampled to the image's grid."""
    # The command is found on the PATH, the arguments are our own, and no shell is involved.
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)  # noqa: S603
    tool = Path(arguments[0]).name
    if ended.returncode != 0 or not made.is_file():
        said = (ended.stderr or ended.stdout).strip().splitlines()
        raise DataError(
            f"case {name}: {tool} failed (exit code {ended.returncode}): {said[-1] if said else 'it said nothing'}. "
            "Try it by hand, or take another --mask."
        )
    volume = read_volume(made)
    marked = Volume(voxels=(volume.voxels != 0).astype(np.float32), affine=volume.affine, path=made)
    mask = _binary(resampled(to_itk(marked), grid_of(image)))
    if not voxels_of(mask).any():
        raise DataError(f"case {name}: {tool} found no brain in t1c. Look at the image, or take another --mask.")
    return mask


def _write(image: sitk.Image, path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

    sitk.WriteImage(image, str(path))


def _shares(mask: sitk.Image) -> sitk.Image:
    import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

    shares: sitk.Image = sitk.Cast(mask, sitk.sitkFloat32)
    return shares


def _binary(shares: sitk.Image) -> sitk.Image:
    """Voxels of which at least half lies inside."""
    mask: sitk.Image = shares >= 0.5
    return mask


def _filled(mask: sitk.Image) -> sitk.Image:
    import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

    filled: sitk.Image = sitk.BinaryFillhole(mask)
    return filled
