"""Find the brain: from the image's own background, a given file, an installed program, or the MNI152 template.

HD-BET (Isensee et al., Human Brain Mapping 40, 4952, 2019) and SynthStrip (Hoopes et al., NeuroImage 260, 119474, 2022)
are run through the commands they install; neither is part of this program. MindGrab's network is computed here, if its
files are installed. The template's mask, mapped by an affine registration, is coarse: it has the shape of an average
brain.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

from data.errors import DataError
from data.labels import Contrast
from data.native_space.config import MASK_WORDS
from data.native_space.itk import grid_of, resampled, to_itk, voxels_of
from data.native_space.mindgrab import Network, mask_agreement, mindgrab_mask
from data.native_space.rigid import register_template
from data.nifti import read_volume
from data.preprocess import image_problem

MaskSource = Literal["own", "file", "hd-bet", "synthstrip", "mindgrab", "atlas", "none"]

#: The command installed by each tool, in the order in which ``auto`` tries them.
COMMANDS: Final = {"hd-bet": "hd-bet", "synthstrip": "mri_synthstrip"}
#: Plausible volume of a brain with its fluid; a head with its skull, or a part of a brain, is outside this range.
BRAIN_LITRES: Final = (0.7, 2.2)
#: If the Dice of MindGrab's masks of two contrasts is below this, a warning is issued.
MIN_AGREEMENT: Final = 0.9


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

    @property
    def litres(self) -> float | None:
        """Volume of the mask; None if nothing is masked."""
        return None if self.mask is None else _litres(self.mask)


def is_stripped(image: sitk.Image) -> bool:
    """Whether an image is a brain on a background of 0, judged by its volume and the voxels on the image's faces.

    Args:
        image: one contrast on its own grid.
    """
    return image_problem(voxels_of(image)) is None and BRAIN_LITRES[0] <= _litres(image) <= BRAIN_LITRES[1]


def _litres(image: sitk.Image) -> float:
    """Volume of the voxels that are not 0."""
    return float(np.count_nonzero(voxels_of(image))) * float(np.prod(image.GetSpacing())) / 1e6


def require_mask(wanted: str, network: Network | None = None) -> None:
    """Check that a mask source is available before time is spent on earlier steps.

    Raises:
        DataError: the tool is not installed, or the value is neither one of :data:`MASK_WORDS` nor a file.
    """
    if wanted in COMMANDS:
        _require(wanted)
    elif wanted == "mindgrab" and network is None:
        raise DataError("--mask mindgrab: not installed. Install it: znormseg model download mindgrab")
    elif wanted not in MASK_WORDS and not Path(wanted).exists():
        raise DataError(f"--mask {wanted}: no such file, and none of {', '.join(MASK_WORDS)}")


def find_brain(
    image: sitk.Image,
    native: sitk.Image,
    wanted: str,
    *,
    name: str,
    network: Network | None = None,
    others: Mapping[Contrast, sitk.Image] | None = None,
) -> BrainMask:
    """Find the brain voxels of an image.

    Args:
        image: T1c, float32, on the grid of the requested mask.
        native: the same contrast on its own grid; used to check whether it is skull-stripped.
        wanted: one of :data:`MASK_WORDS`, or the path of a mask in the scanner coordinates of ``image``. ``auto``
            tries, in this order, the image's own background of 0, HD-BET, SynthStrip, MindGrab, the template.
        name: name of the case, for messages.
        network: computes MindGrab's mask; None if it is not installed.
        others: the other contrasts on the grid of ``image``; MindGrab's masks of them are compared with that of T1c.

    Raises:
        DataError: a requested tool is not installed or fails, a mask is unreadable or empty in this image, or the
            template cannot be registered.
    """
    if wanted == "none":
        return BrainMask(mask=None, source="none", detail="nothing masked, as requested")
    is_own = wanted == "auto" and is_stripped(native)
    if wanted == "auto" and not is_own:
        installed = [tool for tool, command in COMMANDS.items() if shutil.which(command)]
        wanted = [*installed, *(["mindgrab"] if network else []), "atlas"][0]
    if is_own:
        shares = resampled(sitk.Cast(native != 0, sitk.sitkFloat32), grid_of(image))
        detail = "t1c is skull-stripped: its background is 0"
        found = BrainMask(mask=sitk.BinaryFillhole(shares >= 0.5), source="own", detail=detail)
    elif wanted in COMMANDS:
        found = _from_tool(wanted, image, name)
    elif wanted == "mindgrab" and network is not None:
        found = _from_mindgrab(image, others or {}, network, name)
    elif wanted == "atlas":
        found = _from_template(image, name)
    else:
        found = _from_file(Path(wanted), image, name)
    litres, (low, high) = found.litres or 0.0, BRAIN_LITRES
    if low <= litres <= high:
        return found
    doubt = f"the brain mask has {litres:.2f} l; a brain has {low:g} to {high:g} l. Check the mask"
    return replace(found, warnings=(*found.warnings, doubt))


def _from_file(path: Path, image: sitk.Image, name: str) -> BrainMask:
    volume = read_volume(path)
    mask = _on_grid_of(image, volume.voxels > 0.5, volume.affine)
    if not voxels_of(mask).any():
        raise DataError(
            f"case {name}: {path} marks no voxel of t1c. A mask is above 0.5 in the brain, in the scanner coordinates "
            "of t1c."
        )
    return BrainMask(mask=mask, source="file", detail=str(path))


def _from_tool(tool: str, image: sitk.Image, name: str) -> BrainMask:
    """Run a tool on the image's file and read its mask.

    For HD-BET, the mask is taken from the stripped image, because its versions name the mask file differently.
    """
    command, is_hd_bet = _require(tool), tool == "hd-bet"
    device = ["-device", "cpu"] if is_hd_bet and not Path("/dev/nvidiactl").exists() else []
    with tempfile.TemporaryDirectory(prefix="znormseg-") as folder:
        source, target = Path(folder) / "t1c.nii.gz", Path(folder) / "made.nii.gz"
        sitk.WriteImage(image, str(source))
        arguments = [command, "-i", str(source), "-o" if is_hd_bet else "-m", str(target), *device]
        # The command is found on the PATH, the arguments are our own, and no shell is involved.
        ended = subprocess.run(arguments, capture_output=True, text=True, check=False)  # noqa: S603
        if ended.returncode != 0 or not target.is_file():
            lines = (ended.stderr or ended.stdout).strip().splitlines()
            raise DataError(
                f"case {name}: {COMMANDS[tool]} failed (exit code {ended.returncode}): "
                f"{lines[-1] if lines else 'without a message'}. Run it by hand, or choose another --mask."
            )
        made = read_volume(target)
    mask = _on_grid_of(image, made.voxels != 0, made.affine)
    if not voxels_of(mask).any():
        raise DataError(
            f"case {name}: {COMMANDS[tool]} found no brain in t1c. Check the image, or choose another --mask."
        )
    mask = sitk.BinaryFillhole(mask) if is_hd_bet else mask
    return BrainMask(
        mask=mask, source="hd-bet" if is_hd_bet else "synthstrip", detail=" ".join([COMMANDS[tool], *device])
    )


def _from_mindgrab(image: sitk.Image, others: Mapping[Contrast, sitk.Image], network: Network, name: str) -> BrainMask:
    """The mask of T1c, with a warning for each contrast whose own mask differs much from it."""
    mask = mindgrab_mask(image, network, name=f"{name}, contrast t1c")
    warnings = []
    for contrast, other in others.items():
        agreement = mask_agreement(other, mask, network)
        if agreement < MIN_AGREEMENT:
            warnings.append(
                f"{contrast}: MindGrab's brain mask differs from that of t1c (Dice {agreement:.2f}). Check the "
                "registration, and whether both images are of the same head"
            )
    return BrainMask(mask=mask, source="mindgrab", detail="MindGrab, mask of t1c", warnings=tuple(warnings))


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
    template = to_itk(np.where(brain, brightness, 0).astype(np.float32), affine)
    marked = to_itk(brain.astype(np.float32), affine)
    try:
        found = register_template(template, marked, image, name="t1c")
    except DataError as error:
        raise DataError(f"case {name}: {error}") from error
    return BrainMask(
        mask=resampled(marked, grid_of(image), found.transform.GetInverse()) >= 0.5,
        source="atlas",
        coarse=True,
        detail=f"MNI152 by affine registration, mutual information {found.metric_after:.4f}",
        warnings=(
            "the brain mask is coarse: it is that of the MNI152 template, registered to this head. For a better one "
            "run znormseg model download mindgrab, install HD-BET or SynthStrip, or give a mask",
        ),
    )


def _require(tool: str) -> str:
    """Path of a tool's command; a DataError if it is not installed."""
    found = shutil.which(COMMANDS[tool])
    if found is None:
        raise DataError(
            f"--mask {tool}: no command {COMMANDS[tool]} on the PATH. Install it, or use --mask auto, atlas or a file."
        )
    return found


def _on_grid_of(image: sitk.Image, mask: npt.NDArray[np.bool_], affine: npt.NDArray[np.float64]) -> sitk.Image:
    """The voxels of an image of which at least half is inside a mask on another grid."""
    shares: sitk.Image = resampled(to_itk(mask.astype(np.float32), affine), grid_of(image)) >= 0.5
    return shares
