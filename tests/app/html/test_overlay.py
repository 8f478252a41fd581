import numpy as np
import numpy.typing as npt
import pytest

from app.html.overlay import GAP_PX, OUTLINE_COLOURS, OverlayCase, overlay_caption, overlay_picture, shown_slices
from data.labels import ENHANCING, NECROSIS, OEDEMA, Region

SIDE = 128
Codes = npt.NDArray[np.uint8]


def empty(shape: tuple[int, int, int] = (24, 24, 24)) -> Codes:
    return np.zeros(shape, dtype=np.uint8)


def block(x: slice, y: slice, z: slice, code: int = OEDEMA) -> Codes:
    codes = empty()
    codes[x, y, z] = code
    return codes


def overlay(
    prediction: Codes, reference: Codes | None, spacing_mm: tuple[float, float, float] = (1, 1, 1)
) -> OverlayCase:
    background = np.ones(prediction.shape, dtype=np.float32)
    return OverlayCase(
        case="a", background=background, background_name="FLAIR", prediction=prediction, reference=reference,
        spacing_mm=spacing_mm,
    )  # fmt: skip


def draw(case: OverlayCase) -> npt.NDArray[np.uint8]:
    return overlay_picture(case, height_px=SIDE)


def panel(picture: npt.NDArray[np.uint8], row: int, column: int) -> npt.NDArray[np.uint8]:
    top, left = row * (SIDE + GAP_PX), column * (SIDE + GAP_PX)
    return picture[top : top + SIDE, left : left + SIDE]


def pixels_of(picture: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[npt.NDArray[np.intp], ...]:
    return np.nonzero((picture == colour).all(axis=-1))


SPOT = block(slice(4, 10), slice(4, 10), slice(4, 10))


def test_the_picture_has_three_rows_of_two_square_panels() -> None:
    assert draw(overlay(SPOT, SPOT)).shape == (3 * SIDE + 2 * GAP_PX, 2 * SIDE + GAP_PX, 3)


@pytest.mark.parametrize("code", [OEDEMA, NECROSIS, ENHANCING])
def test_the_prediction_is_outlined_only_in_the_right_column(code: int) -> None:
    regions: dict[int, Region] = {OEDEMA: "WT", NECROSIS: "TC", ENHANCING: "ET"}
    colour = OUTLINE_COLOURS[regions[code]]
    picture = draw(overlay(np.where(SPOT, code, 0).astype(np.uint8), empty()))
    for row in range(3):
        assert pixels_of(panel(picture, row, 1), colour)[0].size > 0
        assert pixels_of(panel(picture, row, 0), colour)[0].size == 0


def test_the_reference_is_outlined_only_in_the_left_column() -> None:
    picture = draw(overlay(empty(), SPOT))
    assert pixels_of(panel(picture, 0, 0), OUTLINE_COLOURS["WT"])[0].size > 0
    assert pixels_of(panel(picture, 0, 1), OUTLINE_COLOURS["WT"])[0].size == 0


def test_equal_regions_keep_all_three_lines_visible() -> None:
    picture = draw(overlay(np.where(SPOT, ENHANCING, 0).astype(np.uint8), None))
    for colour in OUTLINE_COLOURS.values():
        assert pixels_of(panel(picture, 0, 1), colour)[0].size > 0


@pytest.mark.parametrize("row", [0, 1])
def test_tumour_on_the_left_of_the_patient_is_on_the_right_of_the_picture(row: int) -> None:
    left_side = block(slice(16, 22), slice(9, 15), slice(9, 15))
    columns = pixels_of(panel(draw(overlay(left_side, None)), row, 1), OUTLINE_COLOURS["WT"])[1]
    assert columns.min() > SIDE / 2


def test_anterior_tumour_is_at_the_top_of_the_axial_picture() -> None:
    front = block(slice(9, 15), slice(2, 8), slice(9, 15))
    rows = pixels_of(panel(draw(overlay(front, None)), 0, 1), OUTLINE_COLOURS["WT"])[0]
    assert rows.max() < SIDE / 2


def test_anterior_tumour_is_on_the_left_of_the_sagittal_picture() -> None:
    front = block(slice(9, 15), slice(2, 8), slice(9, 15))
    columns = pixels_of(panel(draw(overlay(front, None)), 2, 1), OUTLINE_COLOURS["WT"])[1]
    assert columns.max() < SIDE / 2


@pytest.mark.parametrize("row", [1, 2])
def test_superior_tumour_is_at_the_top_of_coronal_and_sagittal_pictures(row: int) -> None:
    upper = block(slice(9, 15), slice(9, 15), slice(16, 22))
    rows = pixels_of(panel(draw(overlay(upper, None)), row, 1), OUTLINE_COLOURS["WT"])[0]
    assert rows.max() < SIDE / 2


def test_slices_with_the_largest_tumour_are_shown() -> None:
    reference = block(slice(4, 12), slice(4, 12), slice(5, 6)) | block(slice(7, 8), slice(6, 7), slice(4, 20))
    assert shown_slices(overlay(SPOT, reference)) == (5, 6, 7)


def test_slices_follow_the_prediction_where_the_reference_is_empty() -> None:
    assert shown_slices(overlay(block(slice(20, 21), slice(8, 9), slice(3, 4)), empty())) == (3, 8, 20)


def test_anisotropic_voxels_are_drawn_to_scale() -> None:
    codes = empty((24, 24, 8))
    codes[8:16, 8:16, 3:6] = OEDEMA  # 8 mm by 8 mm by 9 mm
    rows, columns = pixels_of(panel(draw(overlay(codes, None, (1, 1, 3))), 1, 1), OUTLINE_COLOURS["WT"])
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(9 / 8, rel=0.05)


def test_caption_names_the_contrast_and_the_slices() -> None:
    text = overlay_caption(overlay(block(slice(20, 21), slice(8, 9), slice(3, 4)), None))
    assert text == "FLAIR; axial slice z = 3, coronal y = 8, sagittal x = 20 (voxel index from 0)."


def test_empty_case_is_drawn_without_outlines() -> None:
    case = OverlayCase(
        case="a", background=np.zeros((4, 5, 6), dtype=np.float32), background_name="T1c",
        prediction=empty((4, 5, 6)), reference=None, spacing_mm=(1, 1, 1),
    )  # fmt: skip
    assert all(pixels_of(draw(case), colour)[0].size == 0 for colour in OUTLINE_COLOURS.values())


def test_everything_outside_the_brain_is_black_even_with_negative_intensities() -> None:
    background = np.zeros((24, 24, 24), dtype=np.float32)
    background[8:16, 8:16, 8:16] = np.linspace(-3, 3, 512).reshape(8, 8, 8)
    case = OverlayCase(
        case="a", background=background, background_name="T1c", prediction=empty(), reference=empty(),
        spacing_mm=(1, 1, 1),
    )  # fmt: skip
    assert panel(draw(case), 0, 1)[2, 2].max() == 0


def test_differing_grids_are_refused_with_the_case_id() -> None:
    with pytest.raises(ValueError, match=r"case a: .*the same shape"):
        OverlayCase(
            case="a", background=np.ones((4, 4, 4), dtype=np.float32), background_name="T1c",
            prediction=empty((4, 4, 5)), reference=None, spacing_mm=(1, 1, 1),
        )  # fmt: skip


def test_panels_that_are_too_small_to_read_are_refused() -> None:
    with pytest.raises(ValueError, match="64 pixels"):
        overlay_picture(overlay(SPOT, SPOT), height_px=10)
