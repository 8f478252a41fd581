"""The JSON of predict: a schema that describes every field, and outputs that conform to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pytest

from app import NOTICE
from app.inference.flags import CODES
from app.inference.postprocess import Postprocess
from app.schemas import json_schema
from data.labels import CONTRASTS, REGIONS

Call = Callable[..., Any]

CASE = "BraTS2021_00000"
NAMES = ("predict", "predict-output", "manifest", "presence")
SCHEMAS = {name: json_schema(name) for name in NAMES}
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "predict-json.md"
LEAD = """\
# The JSON of predict

`znormseg predict` writes `OUTPUT/<case>.json` next to each label map, and `OUTPUT/manifest.json`, which lists the
cases. What the numbers mean, and what they do not: [How far to trust a label map](../how-to/trust.md). Fields in
*italics* are not in every file.

There are JSON Schemas (draft 2020-12) for a case (`predict`, or `presence` with a presence run), for `manifest` and for
what `--json` prints (`predict-output`). The documentation site has them in the folder of this page, as
`predict.schema.json` and so on. The installed program prints its own:

```python
import json

from app.schemas import json_schema

print(json.dumps(json_schema("predict"), indent=1))
```

This page and the schemas are generated from the types in `app/schemas.py`.
"""


def problems(name: str, content: Any) -> list[str]:
    """Where a content violates a schema."""
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content)]


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field when it is not null, with the description of the field."""
    found = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    return {**found[0], "description": schema["description"]} if len(found) == 1 else schema


def fields(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Every field: its path, its schema, and whether it is always present."""
    for alternative in schema.get("anyOf", [schema]):
        for name, inner in alternative.get("properties", {}).items():
            yield f"{prefix}{name}", inner, name in alternative.get("required", ())
            yield from fields(inner, f"{prefix}{name}.")
            yield from fields(inner.get("items", {}), f"{prefix}{name}[].")


def kind(schema: dict[str, Any]) -> str:
    """The type of a field in words."""
    nullable = " or null" if {"type": "null"} in schema.get("anyOf", ()) else ""
    schema = without_null(schema)
    if schema.get("enum") == list(CODES):
        return "one of the codes below"
    if schema.get("const", NOTICE) != NOTICE:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    inner = f" of {schema['items'].get('type', 'object')}s" if "items" in schema else ""
    return f"{schema['type']}{inner}{nullable}"


def table(name: str, leave_out: str = "-") -> str:
    """The fields of a schema as Markdown; the regions and contrasts are in the row of their object."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for path, schema, always in fields(SCHEMAS[name]):
        if path.rpartition(".")[2] in {*REGIONS, *CONTRASTS} or path.startswith(leave_out):
            continue
        shown = f"`{path}`" if always else f"*`{path}`*"
        by_region = " By region: `WT`, `TC`, `ET`." if "WT" in without_null(schema).get("properties", {}) else ""
        row = f"| {shown} | {kind(schema)} | {schema['description']}{by_region} |".replace("\n", " ")
        if row not in rows:
            rows.append(row)
    return "\n".join(rows)


def reference() -> str:
    """The page of the reference."""
    flags = "\n".join(["| code | meaning |", "|---|---|", *(f"| `{code}` | {what} |" for code, what in CODES.items())])
    parts = ["## A case", table("predict"), "## Flags", flags, "## `--json`", table("predict-output", "cases[]")]
    parts += ["## `manifest.json`", table("manifest"), "## A case of a presence run", table("presence")]
    return "\n".join([LEAD, *(f"{part}\n" for part in parts)])


# The schemas


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_valid_json_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_described(name: str) -> None:
    found = list(fields(SCHEMAS[name]))
    assert len(found) >= 3
    assert [path for path, schema, _ in found if not schema.get("description", "").endswith(".")] == []


def test_the_flag_codes_match_the_program() -> None:
    described = {path: schema for path, schema, _ in fields(SCHEMAS["predict"])}
    assert described["flags[].code"]["enum"] == list(CODES)


def test_the_reference_page_matches_the_schema() -> None:
    if os.environ.get("ZNORMSEG_REGENERATE"):
        REFERENCE.write_text(reference(), encoding="utf-8")
    assert REFERENCE.read_text(encoding="utf-8") == reference()


# Outputs


@pytest.fixture(scope="module")
def plain(tiny_run: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a case with nothing asked for."""
    from app.inference.batch.predict import predict
    from app.inference.model import load_model
    from app.system.device import RuntimeConfig, choose_runtime
    from data.datasets.layouts import find_cases

    runtime, folder = choose_runtime(RuntimeConfig(device="cpu")), tmp_path_factory.mktemp("plain")
    predict(load_model(tiny_run, runtime), find_cases(phantoms)[:1], folder, runtime=runtime)
    content: dict[str, Any] = json.loads((folder / f"{CASE}.json").read_text())
    return content


def test_a_plain_prediction_conforms_to_the_schema(plain: dict[str, Any]) -> None:
    assert problems("predict", plain) == []


@pytest.mark.parametrize("name", [path for path, _, always in fields(SCHEMAS["predict"]) if always and "." not in path])
def test_a_missing_field_is_noticed(name: str, plain: dict[str, Any]) -> None:
    assert problems("predict", {key: value for key, value in plain.items() if key != name})


def test_an_undescribed_field_is_noticed(plain: dict[str, Any]) -> None:
    assert problems("predict", {**plain, "certainty": 1})
    assert problems("predict", {**plain, "files": {**plain["files"], "certainty": None}})


def test_a_case_without_a_contrast_conforms_to_the_schema(plain: dict[str, Any]) -> None:
    inputs = {contrast: path for contrast, path in plain["inputs"].items() if contrast != "t1"}
    assert problems("predict", {**plain, "inputs": inputs, "missing_contrasts": ["t1"]}) == []


def ensemble_of(run: Path, place: Path) -> Path:
    """An ensemble of a run and itself."""
    best = json.loads(max((run / "checkpoints").glob("best-*.json")).read_text())
    networks = []
    for name in ("fold-0", "fold-1"):
        shutil.copytree(run, place / name)
        networks.append({"network": name, "weights_sha256": best["sha256"], "step": best["step"]})
    content = {"version": 1, "networks": networks, "postprocess": Postprocess().to_json()}
    (place / "ensemble.json").write_text(json.dumps(content))
    return place


def test_every_option_of_an_ensemble_and_a_failure_conform_to_the_schemas(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    shutil.copytree(phantoms / CASE, tmp_path / "in" / CASE)
    shutil.copytree(phantoms / "BraTS2021_00001", tmp_path / "in" / "BraTS2021_00001")
    (tmp_path / "in" / "BraTS2021_00001" / "BraTS2021_00001_t2.nii.gz").write_bytes(b"damaged")
    spoilt = tmp_path / "in" / CASE / f"{CASE}_t2.nii.gz"
    image: Any = nib.load(spoilt)
    voxels = np.asarray(image.dataobj, dtype=np.float32).copy()
    voxels[np.unravel_index(voxels.argmax(), voxels.shape)] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), spoilt)
    asked = ["--tta", "--save-probabilities", "--uncertainty", "--nan-to-zero", "--labels", "brats2023", "--json"]
    ended = znormseg("predict", ensemble_of(tiny_run, tmp_path / "run"), tmp_path / "in", tmp_path / "out", *asked)
    assert ended.code == 6, ended.err
    printed = json.loads(ended.out)
    assert problems("predict-output", printed) == []
    (content,) = printed["cases"]
    assert content == json.loads((tmp_path / "out" / f"{CASE}.json").read_text())
    assert content["nan_to_zero"] == {"t2": 1}
    assert (content["answers"]["networks"], content["answers"]["flips"]) == (2, 8)
    assert None not in content["files"].values()


def test_a_prepared_case_conforms_to_the_schema_and_has_its_files(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import SimpleITK as sitk  # noqa: N813

    from data.native_space import to_brats
    from data.native_space.brain_mask import BrainMask
    from data.native_space.itk import grid_of, voxels_of
    from data.native_space.rigid import Registration
    from data.native_space.to_brats import BratsCase, NativeCase

    found = Registration(
        transform=sitk.TranslationTransform(3),
        metric_before=0.5,
        metric_after=0.5,
        contrast=2.0,
        overlap=1.0,
        cpu_seconds=0.0,
    )

    def as_it_is(given: NativeCase, *_: Any, **__: Any) -> BratsCase:
        return BratsCase(
            id=given.id,
            images={contrast: voxels_of(image) for contrast, image in given.images.items()},
            codes=None,
            grid=grid_of(given.images["t1c"]),
            registrations=dict.fromkeys(("t1", "t2", "flair"), found),
            mask=BrainMask(mask=None, source="own"),
            record={"case": given.id},
            warnings=("look at it",),
        )

    monkeypatch.setattr(to_brats, "prepare_native", as_it_is)
    asked = ["--prepare", "--tta", "--save-probabilities", "--uncertainty", "--json"]
    ended = znormseg("predict", tiny_run, phantoms / CASE, tmp_path, *asked)
    assert ended.code == 0, ended.err
    assert problems("predict-output", json.loads(ended.out)) == []
    (content,) = json.loads(ended.out)["cases"]
    assert {"code": "preparation", "sentence": "look at it."} in content["flags"]
    shares, labels = (
        nib.Nifti1Image.from_filename(content["files"]["probabilities"]).get_fdata(),
        nib.Nifti1Image.from_filename(content["label_map"]).get_fdata(),
    )
    sure = np.abs(shares - 0.5) > 2e-3  # closer ones count as one half
    assert np.array_equal((shares[..., 0] > 0.5)[sure[..., 0]], (labels > 0)[sure[..., 0]])
    assert content["volumes_ml"]["WT"] > 0
