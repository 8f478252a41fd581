"""JSON Schemas (draft 2020-12) of the files that ``predict`` writes, and of what ``predict --json`` prints.

The schemas are generated from the types below; the string literal under a field becomes its description.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Generic, Literal, NotRequired, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from app import NOTICE
from app.inference.flags import CODES
from data.labels import Contrast

T = TypeVar("T")

Text = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Cut = Annotated[float, Field(gt=0, lt=1)]
LabelNumber = Annotated[int, Field(ge=1, le=255)]
Ends = Annotated[list[float], Field(min_length=2, max_length=2)]
Notice = Annotated[str, Field(json_schema_extra={"const": NOTICE})]

_complete = with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))


@_complete
class ByRegion(TypedDict, Generic[T]):
    """A value for each region."""

    WT: T
    """Whole tumour."""
    TC: T
    """Tumour core."""
    ET: T
    """Enhancing tumour."""


@_complete
class ByContrast(TypedDict, Generic[T]):
    """A value for some of the contrasts."""

    t1: NotRequired[T]
    """T1."""
    t1c: NotRequired[T]
    """T1 with contrast agent."""
    t2: NotRequired[T]
    """T2."""
    flair: NotRequired[T]
    """FLAIR."""


@_complete
class Files(TypedDict):
    """Optional files of a case."""

    probabilities: str | None
    """Probabilities of the regions, nested: WT >= TC >= ET (--save-probabilities)."""
    uncertainty: str | None
    """Entropy of these probabilities in bits: 0 certain, 1 undecided (--uncertainty)."""
    disagreement: str | None
    """Part of the entropy that comes from answers that differ, in bits (--uncertainty, with several answers)."""


@_complete
class Answers(TypedDict):
    """The answers that a prediction is the mean of."""

    networks: Positive
    """Number of networks: 1 for a run, several for an ensemble."""
    flips: Literal[1, 8]
    """Number of mirrored images that each network saw: 8 with --tta."""
    volume_range_ml: ByRegion[Annotated[list[Amount], Field(min_length=2, max_length=2)]] | None
    """Smallest and largest volume of each region over the answers, cut at the thresholds; null for a single answer."""


@_complete
class CalibrationState(TypedDict):
    """Calibration of the probabilities."""

    state: Literal["calibrated", "not calibrated"]
    """Only ensembles made by crossval are calibrated."""
    temperature: ByRegion[Annotated[float, Field(gt=0)]] | None
    """Divisor of the logits of the reported probabilities; masks are thresholded before that. null if not measured."""


@_complete
class FlagRecord(TypedDict):
    """A flag."""

    code: Annotated[str, Field(json_schema_extra={"enum": list(CODES)})]
    """Name of the flag; it stays the same from version to version."""
    sentence: Text
    """The flag in words, with numbers."""


@_complete
class Labels(TypedDict):
    """The numbers in a label map."""

    convention: str
    """Name of the label convention, as for --labels."""
    necrosis: LabelNumber
    """Necrotic and non-enhancing core."""
    oedema: LabelNumber
    """Oedema and invaded tissue."""
    enhancing: LabelNumber
    """Enhancing tumour."""


@_complete
class Seconds(TypedDict):
    """Time by stage."""

    read: NotRequired[Amount]
    """Reading and preparing the images."""
    compute: NotRequired[Amount]
    """Networks, thresholds and measurements."""
    prepare_and_compute: NotRequired[Annotated[Amount, Field(alias="prepare and compute")]]
    """With --prepare: all of these together, registration included."""
    write: Amount
    """Writing the label map and the optional files."""


@_complete
class MadeFrom(TypedDict):
    """Checksums of a result and its inputs."""

    settings_sha256: Sha256
    """SHA-256 of weights, rules, options and version."""
    inputs_sha256: dict[str, Sha256]
    """SHA-256 of each input file, by contrast."""
    files_sha256: dict[str, Sha256]
    """SHA-256 of each file that was written, by name."""
    max_memory_gb: NotRequired[float | None]
    """The memory limit of the command; under a different limit, a case with entries in `ladder` is predicted again."""


@_complete
class EnsembleNetwork(TypedDict):
    """A network of an ensemble."""

    network: str
    """Its folder in the ensemble."""
    weights_sha256: Sha256
    """SHA-256 of its weights file."""
    weights_step: Count
    """Optimiser step of its weights."""


@_complete
class PostprocessRules(TypedDict):
    """Rules between probabilities and label map."""

    thresholds: ByRegion[Cut]
    """A voxel belongs to a region if the probability is above this."""
    smallest_mm3: ByRegion[Amount]
    """Smaller components of a region are removed."""
    smallest_share: Share
    """Components of WT with less than this share of the volume of its largest one are removed."""
    fill_core: bool
    """Whether voxels of WT that TC encloses on all sides count as TC."""
    least_enhancing_mm3: Amount
    """If a case has less enhancing tumour than this in total, it counts as necrosis."""


@_complete
class ModelRecord(TypedDict):
    """A published or imported model."""

    name: Text
    """Its name; for a published model, the one in `model list`, and for one network of it, such as `starter/fold-0`."""
    limits: list[Text]
    """Its limits, one sentence each; may be empty."""


@_complete
class GateRecord(TypedDict):
    """What a presence network said about enhancing tumour (--presence)."""

    region: Literal["ET"]
    """The region that it may remove."""
    probability: Share
    """Probability that the region is present, calibrated if the cross-validation fitted that."""
    threshold: Share
    """Below it, the region is removed from the label map; its voxels become non-enhancing core."""
    threshold_tuned: bool
    """Whether a cross-validation chose the threshold on cases that its networks were not trained on."""
    removed: bool
    """Whether the probability is below the threshold."""
    removed_ml: Amount
    """Volume that was removed, in ml; 0 if the segmentation had none."""
    run: str
    """Folder of the presence run or ensemble."""
    weights_sha256: Sha256
    """SHA-256 of its weights; for an ensemble, over those of its networks."""


@_complete
class DecisionRecord(TypedDict):
    """How a logit of a presence network becomes a probability and a decision."""

    slope: float
    """Platt scaling: the calibrated logit is slope times logit plus intercept; 1 if not calibrated."""
    intercept: float
    """0 if not calibrated."""
    threshold: Share
    """The output counts as present from this probability on."""
    gate_threshold: Share
    """In front of a segmentation, the output is removed below this probability."""
    tuned: bool
    """Whether a cross-validation fitted these numbers."""


@_complete
class SlabRecord(TypedDict):
    """A slab of axial slices."""

    from_mm: float
    """Lower border along the superior axis of the file's world space, at the middle of the volume."""
    to_mm: float
    """Upper border."""
    probability: dict[str, Share]
    """By output."""


@_complete
class PresenceSeconds(TypedDict):
    """Time by stage."""

    read: Amount
    """Reading and preparing the images."""
    compute: Amount
    """Networks."""


@_complete
class PresenceMadeFrom(TypedDict):
    """Checksums of a result of a presence network and its inputs."""

    settings_sha256: Sha256
    """SHA-256 of weights, decisions, options and version."""
    inputs_sha256: dict[str, Sha256]
    """SHA-256 of each input file, by contrast."""
    max_memory_gb: None
    """Not used."""
    files_sha256: dict[str, Sha256]
    """Empty: there is no other file."""
    answer_sha256: Sha256
    """SHA-256 of `probability`, `present` and `slabs`."""


@_complete
class PresenceRecord(TypedDict):
    """The answer of a presence run for one case."""

    case: Text
    """Case id."""
    probability: dict[str, Share]
    """Probability that each output is present; with slabs, the largest of them."""
    present: dict[str, bool]
    """Whether the probability is at least the threshold."""
    decisions: dict[str, DecisionRecord]
    """By output."""
    slabs: list[SlabRecord] | None
    """Slabs from the feet to the head; null if the network sees the whole brain."""
    threshold_ml: dict[str, Amount] | None
    """Volume in ml from which a region counted as present in training; null if a CSV file gave the labels."""
    seen_in: Literal["training", "validation"] | None
    """Whether the case was used to train the networks or to choose their weights."""
    missing_contrasts: Annotated[list[Contrast], Field(json_schema_extra={"uniqueItems": True})]
    """Contrasts that the case lacks and that the network was trained to do without."""
    nan_to_zero: ByContrast[Positive]
    """Number of NaN or infinite voxels that were replaced with 0, by contrast (--nan-to-zero)."""
    ladder: list[Text]
    """Empty: a presence network has no fallback for short memory."""
    seconds: PresenceSeconds
    """Time spent by stage, in seconds."""
    inputs: ByContrast[str]
    """Path of each image, by contrast."""
    weights_sha256: Sha256
    """SHA-256 of the weights; for an ensemble, over those of its networks."""
    networks: Positive
    """Number of networks whose logits were averaged."""
    runtime: list[str]
    """Device and precision, with reasons, one sentence each."""
    versions: dict[str, str]
    """Versions of the packages that the result depends on, by name."""
    notice: Notice
    """Intended use."""
    made_from: PresenceMadeFrom
    """SHA-256 of everything the result was made from; a finished case is recognised by it and not predicted again."""


@_complete
class CaseRecord(TypedDict):
    """The result of one case, its measurements and its provenance."""

    case: Text
    """Case id; the names of the files begin with it."""
    label_map: str
    """The label map: NIfTI on the grid of the T1c file (without T1c, of the first contrast that the case has; with
    --prepare, of the contrast in `space`)."""
    files: Files
    """Optional files on the grid of the label map; null if not requested. Each is a 4D NIfTI file with the volumes WT,
    TC, ET, stored as 16-bit integers with a slope and read as 0 to 1."""
    volumes_ml: ByRegion[Amount]
    """Volume of each region in the label map, in ml."""
    confidence: ByRegion[Share | None]
    """Mean probability inside each region of the label map; null if the region is empty. It is not the probability that
    the mask is correct."""
    soft_volumes_ml: ByRegion[Amount]
    """Sum of the probabilities of each region times the volume of a voxel, in ml."""
    components: ByRegion[Count]
    """Number of components of each region in the label map; voxels that touch at a corner are connected."""
    answers: Answers
    """The answers that the probabilities are the mean of: `networks` times `flips`."""
    calibration: CalibrationState
    """Whether the probabilities are calibrated (docs/how-to/calibration.md)."""
    volume_interval_ml: ByRegion[Ends] | None
    """Interval of the true volume of each region in ml, from the errors on cross-validated cases; null if there is
    none."""
    volume_interval_level: Cut | None
    """Share of cases that the interval is meant to cover, such as 0.9."""
    volume_interval_note: str | None
    """Why there is no interval; null if there is one."""
    flags: list[FlagRecord]
    """What to know before relying on the label map; may be empty."""
    labels: Labels
    """The numbers in the label map."""
    seconds: Seconds
    """Time spent by stage, in seconds."""
    nan_to_zero: ByContrast[Positive]
    """Number of NaN or infinite voxels that were replaced with 0, by contrast (--nan-to-zero)."""
    missing_contrasts: Annotated[list[Contrast], Field(json_schema_extra={"uniqueItems": True})]
    """Contrasts that the case lacks and that the network was trained to do without."""
    ladder: list[Text]
    """Fallbacks used because memory was short, one sentence each; may be empty."""
    presence: NotRequired[GateRecord]
    """With --presence: what the presence network said, and what was removed."""
    space: NotRequired[Contrast]
    """With --prepare: the contrast whose grid the label map is on."""
    prepare: NotRequired[dict[str, Any]]
    """With --prepare: how the scans were prepared, as in the prepare.json of `data prepare`."""
    inputs: ByContrast[str]
    """Path of each image, by contrast."""
    input_volumes: NotRequired[ByContrast[Count]]
    """Index of the volume in a 4D file, from 0, by contrast."""
    made_from: MadeFrom
    """SHA-256 of everything the result was made from; a finished case is recognised by it and not predicted again."""
    model: NotRequired[ModelRecord]
    """The published or imported model; left out for a network that was trained here."""
    weights_sha256: Sha256
    """SHA-256 of the weights file; for an ensemble, over those of its networks."""
    weights_step: NotRequired[Count]
    """For a run: optimiser step of the weights."""
    ensemble: NotRequired[Annotated[list[EnsembleNetwork], Field(min_length=1)]]
    """For an ensemble: its networks."""
    postprocess: NotRequired[PostprocessRules | None]
    """For an ensemble: the rules between probabilities and label map; null with --no-postprocess."""
    runtime: list[str]
    """Device and precision, with reasons, one sentence each."""
    versions: dict[str, str]
    """Versions of the packages that the result depends on, by name."""
    notice: Notice
    """Intended use."""


@_complete
class PredictOutput(TypedDict):
    """Results of one command."""

    cases: list[CaseRecord]
    """Cases with a result, each as in its <case>.json, including those that were finished earlier."""
    skipped: list[Text]
    """Ids of the cases that were finished earlier."""
    failures: dict[str, Text]
    """Why cases could not be predicted, by case id."""
    manifest: str | None
    """Path of manifest.json; null if no case has a result."""
    notice: Notice
    """Intended use."""


@_complete
class Counts(TypedDict):
    """Number of cases by status."""

    done: Count
    """Cases that this command predicted."""
    skipped: Count
    """Cases that were finished earlier."""
    failed: Count
    """Cases that could not be predicted."""
    left: Count
    """Cases that the command did not reach."""


@_complete
class Execution(TypedDict):
    """Where a case was processed."""

    worker: NotRequired[Annotated[str, Field(description="Process: main, worker-N or ray-<process id>.")]]
    device: NotRequired[Annotated[str, Field(description="cpu, cuda or cuda:N, as the machine numbers its GPUs.")]]
    host: NotRequired[Annotated[str, Field(description="Name of the machine.")]]
    attempts: NotRequired[
        Annotated[Count, Field(description="Attempts: more than one if workers were lost; unknown with Ray.")]
    ]


@_complete
class DoneEntry(Execution):
    """A case with a result."""

    case: Text
    """Case id."""
    status: Literal["done", "skipped"]
    """done: this command predicted the case. skipped: it was finished earlier, according to its SHA-256."""
    files_sha256: dict[str, Sha256]
    """SHA-256 of each file that was written, by its name in the folder of the manifest, without <case>.json."""
    inputs_sha256: dict[str, Sha256]
    """SHA-256 of each image, by contrast."""
    seconds: dict[str, Amount]
    """Time spent by stage, in seconds."""


@_complete
class FailedEntry(Execution):
    """A case that could not be predicted."""

    case: Text
    """Case id."""
    status: Literal["failed"]
    """failed: the case could not be predicted."""
    message: str
    """Why it failed."""


@_complete
class LeftEntry(TypedDict):
    """A case that the command did not reach."""

    case: Text
    """Case id."""
    status: Literal["left"]
    """left: the command was stopped before it reached the case."""


@_complete
class Manifest(TypedDict):
    """All cases of the last command that wrote to the folder, and their outcomes."""

    version: Literal[1]
    """Version of this format."""
    run: str | None
    """Folder of the run or the ensemble, as given; null if unknown."""
    weights_sha256: Sha256
    """SHA-256 of the weights file; for an ensemble, over those of its networks."""
    settings_sha256: Sha256
    """SHA-256 of `settings`."""
    settings: dict[str, Any]
    """Everything except the images that determines a result: weights, options, post-processing, overlap of windows,
    version of the program."""
    engine: Literal["local", "ray"]
    """How the cases were distributed."""
    ended: bool
    """Whether the command reached its end; false if it was interrupted or an error stopped it."""
    seconds: Amount
    """Time that the command spent on the cases, in seconds, without loading the program."""
    counts: Counts
    """Number of cases by status."""
    cases: list[DoneEntry | FailedEntry | LeftEntry]
    """The cases, sorted by id."""
    versions: dict[str, str]
    """Versions of the packages that a result depends on, on the machine that wrote the manifest."""
    notice: Notice
    """Intended use."""


#: Type and title of each schema, by its name.
RECORDS: Final[dict[str, tuple[Any, str]]] = {
    "predict": (CaseRecord, "OUTPUT/<case>.json of znormseg predict"),
    "predict-output": (PredictOutput, "What znormseg predict --json prints"),
    "manifest": (Manifest, "OUTPUT/manifest.json of znormseg predict"),
    "presence": (PresenceRecord, "OUTPUT/<case>.json of znormseg predict with a presence run"),
}


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a record.

    Args:
        name: ``predict`` (``<case>.json``), ``predict-output`` (``--json``), ``manifest`` or ``presence``.

    Example:
        >>> json_schema("predict-output")["required"]
        ['cases', 'skipped', 'failures', 'manifest', 'notice']
    """
    record, title = RECORDS[name]
    schema = TypeAdapter(record).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:znormseg:schema:{name}:1",
        "title": title,
        **_inlined(schema, schema.pop("$defs")),
    }


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """Replace references with their definitions, and drop titles, which repeat the names of types and fields."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    definition = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
    kept = {key: value for key, value in {**definition, **node}.items() if key not in {"$ref", "title"}}
    return {key: _inlined(value, definitions) for key, value in kept.items()}
