"""Identifying contrasts: names in several languages, timings, series that are skipped, series that are rejected."""

from __future__ import annotations

import io
from typing import Any

import pydicom
import pytest

from data.dicom.files import DicomFile
from data.dicom.series import Acquisition, Frame, Series
from data.dicom.series_choice import choose_series, identify, series_of, timing
from data.errors import DataError

MPRAGE = {"echo_ms": 3.0, "repetition_ms": 1900.0, "inversion_ms": 900.0, "scanning": ("GR", "IR")}
SPIN_T1 = {"echo_ms": 12.0, "repetition_ms": 550.0, "scanning": ("SE",)}
T2 = {"echo_ms": 98.0, "repetition_ms": 4500.0, "scanning": ("SE",)}
FLAIR = {"echo_ms": 94.0, "repetition_ms": 9000.0, "inversion_ms": 2500.0, "scanning": ("SE", "IR")}
FLAIR_3D = {"echo_ms": 388.0, "repetition_ms": 5000.0, "inversion_ms": 1800.0, "scanning": ("SE", "IR")}
PD = {"echo_ms": 14.0, "repetition_ms": 3500.0, "scanning": ("SE",)}
UNKNOWN: dict[str, Any] = {}


def series(name: str = "", timed: dict[str, Any] = UNKNOWN, *, key: str = "1", slices: int = 20, **more: Any) -> Series:
    problems, has_voxels = more.pop("problems", ()), more.pop("has_voxels", True)
    volumes = more.pop("volumes", 1)
    file = DicomFile(name="a", header=pydicom.Dataset(), has_voxels=has_voxels, open=io.BytesIO)
    frame = Frame(
        file=file,
        number=0,
        rows=8,
        columns=8,
        position_mm=(0, 0, 0),
        directions=(1, 0, 0, 0, 1, 0),
        spacing_mm=(1, 1),
        thickness_mm=1,
        slope=1,
        intercept=0,
        padding=None,
        parts=(),
    )
    fields = {"modality": "MR", "image_type": ("ORIGINAL", "PRIMARY", "M"), "description": name, **timed, **more}
    return Series(
        key=key,
        uid=f"1.2.{key}",
        number=int(key.partition("/")[0]),
        volumes_in_series=volumes,
        frames=(frame,) * slices,
        acquisition=Acquisition(**fields),
        problems=problems,
    )


@pytest.mark.parametrize(
    ("name", "timed", "contrast"),
    [
        ("t1_mprage_sag_p2_iso", MPRAGE, "t1"),
        ("t1_mpr_sag", MPRAGE, "t1"),
        ("T1W_3D_TFE", {**MPRAGE, "inversion_ms": None}, "t1"),
        ("Ax 3D BRAVO", MPRAGE, "t1"),
        ("SAG T1 SE", SPIN_T1, "t1"),
        ("AX T1 FLAIR", {**MPRAGE, "echo_ms": 24.0, "repetition_ms": 2200.0, "scanning": ("SE", "IR")}, "t1"),
        ("Ax T1 pre", SPIN_T1, "t1"),
        ("T1 nativ", SPIN_T1, "t1"),
        ("T1 tra vor KM", SPIN_T1, "t1"),
        ("T1 ohne KM", SPIN_T1, "t1"),
        ("AX T1 W/O CONTRAST", SPIN_T1, "t1"),
        ("T1 sans gado", SPIN_T1, "t1"),
        ("SE T1 senza mdc", SPIN_T1, "t1"),
        ("T1 post OP", SPIN_T1, "t1"),
        ("AX T1 C-", SPIN_T1, "t1"),
        ("AX T1 PRE GD FLAIR", {**MPRAGE, "echo_ms": 24.0, "scanning": ("SE", "IR")}, "t1"),
        ("T1 voor contrast", SPIN_T1, "t1"),
        ("sT1W_3D_TFE SENSE", MPRAGE, "t1"),
        ("AX T1 POST GD FLAIR", {**MPRAGE, "echo_ms": 24.0, "scanning": ("SE", "IR")}, "t1c"),
        ("AX IRSPGR 3D +C", MPRAGE, "t1c"),
        ("T1wCE", MPRAGE, "t1c"),
        ("Post-Contrast T1", SPIN_T1, "t1c"),
        ("t1_mpr_ns_sag_pat2_iso POST", MPRAGE, "t1c"),
        ("T1 post", SPIN_T1, "t1c"),
        ("AX T1 +C", SPIN_T1, "t1c"),
        ("T1+C 3D", MPRAGE, "t1c"),
        ("T1 C+", MPRAGE, "t1c"),
        ("t1_mprage_tra_KM", MPRAGE, "t1c"),
        ("t1_fl2d_tra_nach KM", {"echo_ms": 2.5, "repetition_ms": 250.0, "scanning": ("GR",)}, "t1c"),
        ("T1 TSE GD", SPIN_T1, "t1c"),
        ("T1w Gado 3D", MPRAGE, "t1c"),
        ("T1 POST CONTRAST", SPIN_T1, "t1c"),
        ("T1 con contraste", SPIN_T1, "t1c"),
        ("T1 MPRAGE con mdc", MPRAGE, "t1c"),
        ("T1 apr\u00e8s injection", SPIN_T1, "t1c"),
        ("3D_T1CE", MPRAGE, "t1c"),
        ("T2 tse tra", T2, "t2"),
        ("T2W_TSE", T2, "t2"),
        ("AX T2 FRFSE", T2, "t2"),
        ("t2_spc_sag_iso", {"echo_ms": 408.0, "repetition_ms": 3200.0, "scanning": ("SE",)}, "t2"),
        ("t2_tirm_tra_dark-fluid", FLAIR, "flair"),
        ("t2_spc_da-fl_sag", FLAIR_3D, "flair"),
        ("AX FLAIR", FLAIR, "flair"),
        ("FLAIR_longTR", {**FLAIR, "inversion_ms": None}, "flair"),
        ("3D Brain VIEW FLAIR SHC", FLAIR_3D, "flair"),
        ("Sag CUBE T2FLAIR", FLAIR_3D, "flair"),
        ("T2 FLAIR +C", FLAIR, "flair"),
        ("", MPRAGE, "t1"),
        ("", SPIN_T1, "t1"),
        ("", T2, "t2"),
        ("", FLAIR, "flair"),
        ("serie 4", FLAIR, "flair"),
        ("T1", UNKNOWN, "t1"),
        ("FLAIR", UNKNOWN, "flair"),
        ("PD+T2 tse", T2, "t2"),
    ],
)
def test_series_names_and_timings_of_several_vendors_are_recognised(
    name: str, timed: dict[str, Any], contrast: str
) -> None:
    assert identify(series(name, timed)).contrast == contrast


@pytest.mark.parametrize(
    ("name", "timed", "more", "reason"),
    [
        ("AAHScout", MPRAGE, {}, "localizer"),
        ("3-plane loc", MPRAGE, {}, "localizer"),
        ("Survey", MPRAGE, {}, "localizer"),
        ("T1 sag", SPIN_T1, {"slices": 3}, "3 slices"),
        ("ep2d_diff_3scan_trace_ADC", T2, {}, "diffusion"),
        ("dDWI", T2, {}, "diffusion"),
        ("Axial", T2, {"b_value": 1000.0}, "diffusion"),
        ("ep2d_perf", T2, {}, "perfusion"),
        ("relCBV", T2, {"image_type": ("DERIVED", "PRIMARY", "CBV")}, "perfusion"),
        ("SWI_Images", PD, {}, "susceptibility"),
        ("T2* GRE", PD, {}, "susceptibility"),
        ("gre hemo", {"echo_ms": 25.0, "repetition_ms": 800.0, "scanning": ("GR",)}, {}, "susceptibility"),
        ("", {"echo_ms": 25.0, "repetition_ms": 800.0, "scanning": ("GR",)}, {}, "T2*"),
        ("tof_fl3d", SPIN_T1, {}, "angiography"),
        ("T1 MIP", SPIN_T1, {}, "projection"),
        ("T1 MPR cor", SPIN_T1, {"image_type": ("DERIVED", "SECONDARY", "MPR")}, "reformatted"),
        ("T1", SPIN_T1, {"image_type": ("DERIVED", "SECONDARY", "OTHER")}, "derived"),
        ("T1 SUB", SPIN_T1, {}, "subtraction"),
        ("T1 map", SPIN_T1, {}, "map"),
        ("T1", SPIN_T1, {"image_type": ("ORIGINAL", "PRIMARY", "P")}, "phase"),
        ("T2 STIR", T2, {}, "STIR"),
        ("", {"echo_ms": 40.0, "repetition_ms": 4000.0, "inversion_ms": 160.0}, {}, "STIR"),
        ("PD tse", PD, {}, "proton density"),
        ("", PD, {}, "proton density"),
        ("T1 C-SPINE", SPIN_T1, {}, "not the brain"),
        ("T1", SPIN_T1, {"modality": "CT"}, "modality CT"),
        ("T1", SPIN_T1, {"has_voxels": False}, "no image"),
        ("brain", {"echo_ms": 80.0, "repetition_ms": 4000.0, "scanning": ("EP",)}, {}, "echo-planar"),
        ("T2 tse", MPRAGE, {}, "contradictory: its name says T2, its timing T1"),
        ("T1 se", T2, {}, "contradictory: its name says T1, its timing T2"),
        ("FLAIR", T2 | {"inversion_ms": 150.0}, {}, "contradictory"),
        ("serie 4", UNKNOWN, {}, "neither its name nor its timing"),
    ],
)
def test_other_series_are_skipped_with_a_reason(
    name: str, timed: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    finding = identify(series(name, timed, **more))
    assert finding.contrast is None
    assert reason in finding.reason


@pytest.mark.parametrize(
    ("name", "agent", "contrast"),
    [
        ("t1_se", "Gadovist", "t1c"),
        ("t1_se", "", "t1"),
        ("t1_se", None, "t1"),
        ("t1_se", "none", "t1"),
        ("t1_se pre", "Gadovist", "t1"),
        ("t1_se post", None, "t1c"),
        ("T1 pre and post Gd", "Gadovist", "t1c"),
    ],
)
def test_the_name_indicates_the_contrast_agent_and_otherwise_the_header_does(
    name: str, agent: str | None, contrast: str
) -> None:
    assert identify(series(name, SPIN_T1, agent=agent)).contrast == contrast


def four() -> list[Series]:
    return [
        series("t1", SPIN_T1, key="2"),
        series("t1 KM", SPIN_T1, key="5"),
        series("t2", T2, key="3"),
        series("flair", FLAIR, key="4"),
    ]


def test_time_points_of_a_dynamic_series_are_not_candidates() -> None:
    assert "one of 60 volumes" in identify(series("T1 dyn", SPIN_T1, volumes=60)).reason


def test_another_modality_cannot_be_chosen_even_explicitly() -> None:
    with pytest.raises(DataError, match=r"t1: series 7 .*modality CT, not MR"):
        choose_series([*four(), series("head", UNKNOWN, key="7", modality="CT")], {"t1": "7"})


def test_each_choice_has_a_reason() -> None:
    choices = choose_series(four())
    assert {contrast: choice.series.key for contrast, choice in choices.items()} == {
        "t1": "2",
        "t1c": "5",
        "t2": "3",
        "flair": "4",
    }
    assert choices["t1c"].reason == "name 't1 KM'; TE 12 ms, TR 550 ms; 'km' in its name"


def test_two_candidates_are_refused_with_their_differences_and_the_option() -> None:
    with pytest.raises(DataError) as refused:
        choose_series([*four(), series("t2 cor", T2, key="9")])
    assert str(refused.value).startswith(
        "2 series may be the t2: 3 ('t2', TE 98 ms, TR 4500 ms), 9 ('t2 cor', TE 98 ms, TR 4500 ms); "
        "choose with --t2 SERIES"
    )


@pytest.mark.parametrize("key", ["9", "1.2.9", " 9 "])
def test_an_explicit_number_or_uid_resolves_the_choice(key: str) -> None:
    choices = choose_series([*four(), series("t2 cor", T2, key="9")], {"t2": key})
    assert choices["t2"].series.key == "9"
    assert choices["t2"].reason == "chosen with --t2"


def test_an_unrecognised_series_can_be_chosen_and_a_chosen_one_serves_no_other_contrast() -> None:
    others = [series("brain", UNKNOWN, key="7") if one.key == "2" else one for one in four()]
    assert choose_series(others, {"t1": "7"})["t1"].series.key == "7"
    both = [*four(), series("t1 Gd", SPIN_T1, key="8")]
    assert choose_series(both, {"t1": "8"})["t1c"].series.key == "5"


def test_everything_missing_is_reported_at_once() -> None:
    with pytest.raises(DataError, match=r"the t1c; .*--t1c SERIES; no series was recognised as the flair; .*--flair"):
        choose_series([one for one in four() if one.key in "23"])


def test_an_unknown_or_repeated_choice_is_refused() -> None:
    with pytest.raises(DataError, match=r"--t1 77: no such series. There are 2, 5, 3, 4"):
        choose_series(four(), {"t1": "77"})
    with pytest.raises(DataError, match=r"series 2 was chosen as --t1c? and as --t1c?"):
        choose_series(four(), {"t1": "2", "t1c": "2"})


def test_a_number_shared_by_several_volumes_is_refused_with_their_names() -> None:
    echoes = [series("t2", T2, key="3/1"), series("t2", T2, key="3/2")]
    with pytest.raises(DataError, match=r"--t2 3: 2 volumes match: 3/1 .*, 3/2 .* Give one of them by its first word"):
        choose_series([*four()[:2], *echoes, four()[3]], {"t2": "3"})


def test_original_images_are_preferred_to_derived_ones() -> None:
    derived = series("t2", T2, key="9", image_type=("DERIVED", "PRIMARY", "M"))
    assert choose_series([*four(), derived])["t2"].series.key == "3"
    assert choose_series([*[one for one in four() if one.key != "3"], derived])["t2"].series.key == "9"


def test_complete_volumes_are_preferred_and_a_lone_damaged_one_is_refused() -> None:
    damaged = series("t2", T2, key="9", problems=("2 slices are missing",))
    assert choose_series([*four(), damaged])["t2"].series.key == "3"
    with pytest.raises(DataError, match=r"t2: series 9 .*2 slices are missing.*--t2 SERIES"):
        choose_series([*[one for one in four() if one.key != "3"], damaged])


def test_a_series_is_found_by_contrast_number_or_uid() -> None:
    assert [series_of(four(), name).key for name in ("t1c", "T1C", "5", "1.2.5")] == ["5"] * 4
    assert series_of([*four(), series("t2 cor", T2, key="9")], "t1c").key == "5"


def test_timing_reports_what_is_known() -> None:
    assert timing(Acquisition(echo_ms=2.96)) == "TE 2.96 ms"
    assert timing(Acquisition()) == ""
