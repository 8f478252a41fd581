"""Label numbers, codes and regions: round trips, and the values a label map may contain."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data import labels
from data.errors import DataError
from data.labels import (
    BACKGROUND,
    BRATS2021,
    BRATS2023,
    CONVENTIONS,
    ENHANCING,
    NECROSIS,
    OEDEMA,
    REGIONS,
    LabelConvention,
    Naming,
    convention_of_names,
    decide_convention,
    decode,
    decode_tissues,
    encode,
    from_regions,
    region_codes,
    to_regions,
)

properties = settings(derandomize=True, deadline=None, max_examples=50)
shapes = hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)
code_maps = hnp.arrays(np.uint8, shapes, elements=st.integers(0, 3))
any_masks = shapes.flatmap(lambda shape: hnp.arrays(np.bool_, (3, *shape)))
conventions = st.sampled_from(list(CONVENTIONS.values()))


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda convention: convention.name)
@pytest.mark.parametrize("read", [decode, decode_tissues])
def test_bytes_are_decoded_like_other_integers(read: Any, convention: LabelConvention) -> None:
    numbers = np.random.default_rng(0).choice(list(convention.codes), (9, 8, 7)).astype(np.uint8)
    np.testing.assert_array_equal(read(numbers, convention), read(numbers.astype(np.int16), convention))


@properties
@given(code_maps, conventions)
def test_decode_undoes_encode(codes: Any, convention: LabelConvention) -> None:
    np.testing.assert_array_equal(decode(encode(codes, convention), convention), codes)


@properties
@given(shapes, conventions, st.data())
def test_encode_undoes_decode(shape: Any, convention: LabelConvention, data: st.DataObject) -> None:
    numbers = st.sampled_from([0, *convention.values])
    label_map = data.draw(hnp.arrays(np.uint8, shape, elements=numbers))
    np.testing.assert_array_equal(encode(decode(label_map, convention), convention), label_map)


@properties
@given(code_maps)
def test_regions_of_a_label_map_are_nested(codes: Any) -> None:
    whole, core, enhancing = to_regions(codes)
    assert not (core & ~whole).any()
    assert not (enhancing & ~core).any()


@properties
@given(code_maps)
def test_from_regions_undoes_to_regions(codes: Any) -> None:
    np.testing.assert_array_equal(from_regions(to_regions(codes)), codes)


@properties
@given(any_masks)
def test_whole_tumour_of_a_label_map_equals_that_of_the_masks(masks: Any) -> None:
    np.testing.assert_array_equal(to_regions(from_regions(masks))[0], masks[0])


@properties
@given(any_masks)
def test_non_nested_masks_are_clipped_to_the_larger_region(masks: Any) -> None:
    np.testing.assert_array_equal(to_regions(from_regions(masks)), np.logical_and.accumulate(masks, axis=0))


@properties
@given(code_maps)
def test_each_region_consists_of_its_codes(codes: Any) -> None:
    for region, mask in zip(REGIONS, to_regions(codes), strict=True):
        np.testing.assert_array_equal(mask, np.isin(codes, region_codes(region)))


def test_both_conventions_use_the_label_numbers_of_brats() -> None:
    codes = np.array([BACKGROUND, NECROSIS, OEDEMA, ENHANCING], dtype=np.uint8)
    assert encode(codes, BRATS2021).tolist() == [0, 1, 2, 4]
    assert encode(codes, BRATS2023).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64])
def test_decode_returns_uint8_codes_for_whole_numbers_of_any_dtype(dtype: Any) -> None:
    codes = decode(np.array([[0, 4], [2, 1]], dtype=dtype), BRATS2021)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [[0, 3], [2, 1]]


@pytest.mark.parametrize(
    ("values", "naming", "expected"),
    [
        ([0, 1, 2, 4], None, BRATS2021),
        ([0, 1, 2, 4], "brats2023", BRATS2021),
        ([4], None, BRATS2021),
        ([0, 1, 2, 3], None, BRATS2023),
        ([0, 1, 2, 3], "brats2021", BRATS2023),
        ([0, 1, 2], "brats2023", BRATS2023),
        ([0, 1, 2], "brats2021", BRATS2021),
        ([0, 1, 2], None, BRATS2021),
        ([], "brats2023", BRATS2023),
    ],
)
def test_the_enhancing_label_decides_the_convention_and_otherwise_the_file_names(
    values: list[int], naming: Any, expected: LabelConvention
) -> None:
    assert decide_convention(values, naming=naming) is expected


@pytest.mark.parametrize("naming", [None, "brats2021", "brats2023"])
def test_labels_3_and_4_together_are_refused(naming: Any) -> None:
    with pytest.raises(DataError, match="3 and 4 occur together"):
        decide_convention([0, 1, 2, 3, 4], naming=naming)


@pytest.mark.parametrize("values", [[0, 1, 5], [-1, 0], [0, 4, 255]])
def test_numbers_outside_every_convention_are_refused_and_named(values: list[int]) -> None:
    foreign = next(value for value in values if value not in range(5))
    with pytest.raises(DataError, match=rf"label values \[{foreign}\] belong to no known convention"):
        decide_convention(values)


@pytest.mark.parametrize(
    ("values", "convention", "named"),
    [
        ([0.0, 1.5], BRATS2021, r"label values 1\.5 are"),
        ([0, 3], BRATS2021, "label values 3 are"),
        ([0, 4], BRATS2023, "label values 4 are"),
        ([-2, 7], BRATS2023, "label values -2, 7 are"),
        ([0.0, np.nan], BRATS2021, "label values nan are"),
        ([256, 0], BRATS2021, "label values 256 are"),
    ],
)
def test_decode_names_the_values_it_refuses(values: list[float], convention: LabelConvention, named: str) -> None:
    with pytest.raises(DataError, match=named):
        decode(np.array(values), convention)


@pytest.mark.parametrize(
    ("convention", "whole", "core", "enhancing"),
    [
        ("brats2021", {1, 2, 4}, {1, 4}, {4}),
        ("brats2023", {1, 2, 3}, {1, 3}, {3}),
        ("brats2024", {1, 2, 3}, {1, 3}, {3}),
        ("brats2024-ped", {1, 2, 3, 4}, {1, 2, 3}, {1}),
        ("brats2015", {1, 2, 3, 4}, {1, 3, 4}, {4}),
        ("msd", {1, 2, 3}, {2, 3}, {3}),
    ],
)
def test_every_convention_has_the_regions_of_its_challenge(
    convention: str, whole: set[int], core: set[int], enhancing: set[int]
) -> None:
    numbers = np.array(sorted(CONVENTIONS[convention].codes), dtype=np.uint8)
    masks = to_regions(decode(numbers, CONVENTIONS[convention]))
    assert [set(numbers[mask].tolist()) for mask in masks] == [whole, core, enhancing]


@properties
@given(shapes, conventions, st.data())
def test_read_only_label_numbers_keep_their_region(
    shape: Any, convention: LabelConvention, data: st.DataObject
) -> None:
    label_map = data.draw(hnp.arrays(np.uint8, shape, elements=st.sampled_from(sorted(convention.codes))))
    codes = decode(label_map, convention)
    written = encode(codes, convention)
    assert set(np.unique(written)) <= {0, *convention.values}
    np.testing.assert_array_equal(decode(written, convention), codes)


@pytest.mark.parametrize(
    ("values", "naming", "expected"),
    [
        ([1, 2, 3], "msd", "msd"),
        ([1, 2, 3], "gli", "brats2023"),
        ([1, 2, 3, 4], "gli", "brats2024"),
        ([1, 2, 3, 4], "ped", "brats2024-ped"),
        ([1, 2, 3, 4], "brats2015", "brats2015"),
        ([0], "ped", "brats2021"),
        ([0], "gli", "brats2023"),
    ],
)
def test_a_family_of_data_sets_has_its_own_numbers(values: list[int], naming: Naming, expected: str) -> None:
    assert decide_convention(values, naming=naming).name == expected


@pytest.mark.parametrize("values", [[1], [2], [1, 2], [3], [1, 2, 3]])
@pytest.mark.parametrize("naming", [None, "brats2021"])
def test_outside_case_folders_a_3_or_the_lack_of_a_4_does_not_decide_the_convention(
    values: list[int], naming: Naming | None
) -> None:
    if naming is None or 3 in values:
        with pytest.raises(DataError, match=r"--labels: brats2023 .* msd"):
            decide_convention(values, naming=naming, case_folders=False)
    else:
        assert decide_convention(values, naming=naming, case_folders=False) is BRATS2021


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"background": (0,), "edema": (1,), "non-enhancing tumor": (2,), "enhancing tumour": (3,)}, "msd"),
        ({"whole tumor": (1, 2, 3), "tumor core": (2, 3), "enhancing tumor": (3,)}, "msd"),
        ({"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}, "brats2023"),
        ({"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,), "RC": (4,)}, "brats2024"),
        ({"NCR/NET": (1,), "ED": (2,), "ET": (4,)}, "brats2021"),
        ({"NETC": (1,), "SNFH": (2,), "ET": (3,), "RC": (4,)}, "brats2024"),
        ({"ET": (1,), "NET": (2,), "CC": (3,), "ED": (4,)}, "brats2024-ped"),
        ({"necrotic_core": (1,), "peritumoral_edema": (2,), "GD-enhancing": (3,)}, "brats2023"),
        ({"enhancing": (1,), "edema": (2,), "necrosis": (3,)}, None),
        ({"label 1": (1,), "label 2": (2,), "label 3": (3,)}, None),
        ({"edema": (1,)}, None),
        ({}, None),
    ],
)
def test_label_names_determine_the_convention_or_nothing(
    names: dict[str, tuple[int, ...]], expected: str | None
) -> None:
    found = convention_of_names(names)
    assert (found and found.name) == expected


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(labels).failed == 0
