"""Presence from phantoms to the page: training, prediction, scores, cross-validation, the gate, and bad input."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
import typer

from app.cli.presence import refuse_for_presence
from app.config.load import RunConfig, load_config
from app.errors import ConfigError, RunError
from app.evaluation.presence_scores import read_presence_predictions
from app.inference.tumour_presence.gate import Gate, GateAnswer
from app.inference.tumour_presence.model import load_presence
from app.schemas import json_schema
from app.training.presence import Presence
from app.training.run import resume, start
from data.datasets.source import DataSource
from data.errors import DataError
from data.patches.sampler import Batch

Call = Callable[..., Any]
Table = Callable[[Iterable[str]], Path]

TINY = [
    "network.channels=[4, 4, 4, 4]",
    "training.patch_voxels=[40, 48, 40]",
    "training.batch_size=2",
    "training.steps=3",
    "training.validations=1",
    "data.spacing_mm=4",
    "runtime.device=cpu",
    "runtime.precision=float32",
]
SLABS = [
    "runtime.channels_last=false",
    "task.by_slab=true",
    "network.slices=6",
    "training.patch_voxels=[40, 48, 6]",
    "task.outputs=[WT, ET]",
]


@pytest.fixture(scope="module")
def cases(phantoms: Path) -> list[str]:
    """The ids of the phantoms."""
    return sorted(path.name for path in phantoms.iterdir())


@pytest.fixture(scope="module")
def split(cases: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split whose training cases have the only phantom without enhancing tumour, number 4."""
    path = tmp_path_factory.mktemp("split") / "split.json"
    path.write_text(json.dumps({"train": [cases[0], cases[1], cases[4]], "validation": [cases[2]]}))
    return path


@pytest.fixture(scope="module")
def presence_run(phantoms: Path, split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A presence run with the tiny settings."""
    run = tmp_path_factory.mktemp("presence") / "run"
    start(DataSource(phantoms), run, load_config("presence", TINY), split_file=split)
    return run


@pytest.fixture(scope="module")
def predictions(presence_run: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions of that run; tests must not modify them."""
    from app.inference.batch.presence import predict_presence
    from app.runs.training_record import training_record
    from app.system.device import RuntimeConfig, choose_runtime

    runtime = choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
    output = tmp_path_factory.mktemp("predictions") / "out"
    model, found = load_presence(presence_run, runtime), tuple(DataSource(phantoms).find_cases().values())
    training = training_record(presence_run)
    predict_presence(model, found, output, runtime=runtime, run=presence_run, training=training)
    return output


@pytest.fixture
def table(cases: list[str], tmp_path: Path) -> Table:
    """Write a table of labels, from lines that replace the default ones."""

    def write(lines: Iterable[str]) -> Path:
        path = tmp_path / "labels.csv"
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        return path

    return write


def rows_of(cases: list[str]) -> list[str]:
    return ["case,grade,ET", *(f"{case},{number % 2},1" for number, case in enumerate(cases))]


def started(phantoms: Path, run: Path, table: Path, *more: str) -> None:
    settings = [*TINY, f"task.labels_csv={table}", "task.outputs=[grade]", *more]
    start(DataSource(phantoms), run, load_config("presence", settings))


# Training


def test_the_labels_of_all_cases_are_recorded(presence_run: Path, cases: list[str]) -> None:
    from data.phantoms.sampling import draw_kind

    record = json.loads((presence_run / "run.json").read_text())["presence"]
    assert record["labels"] == {case: [int(draw_kind(int(case[-5:]), 0).enhances)] for case in (*cases[:3], cases[4])}


def test_present_and_absent_cases_have_the_same_total_weight(presence_run: Path) -> None:
    record = json.loads((presence_run / "run.json").read_text())["presence"]
    train = json.loads((presence_run / "split.json").read_text())["train"]
    present = sum(record["labels"][case][0] for case in train)
    totals = present * record["weight_present"][0], (len(train) - present) * record["weight_absent"][0]
    assert totals == pytest.approx((len(train) / 2, len(train) / 2))


def test_a_validation_records_the_brier_score_and_the_area_under_the_roc_curve(presence_run: Path) -> None:
    records = [json.loads(line) for line in (presence_run / "metrics.jsonl").read_text().splitlines()]
    (validation,) = (record for record in records if record["kind"] == "validation")
    assert 0 <= validation["one_minus_brier"]["ET"] == validation["mean_one_minus_brier"] <= 1
    assert set(validation["auroc"]) == {"ET"}


def test_a_resumed_presence_run_has_the_weights_of_an_uninterrupted_one(
    phantoms: Path, split: Path, tmp_path: Path
) -> None:
    from app.runs.checkpoints import load_newest

    constant = [*TINY, "training.schedule=constant", "training.warmup=0"]
    shorter, longer = (load_config("presence", [*constant, f"training.steps={steps}"]) for steps in (2, 3))
    start(DataSource(phantoms), tmp_path / "resumed", shorter, split_file=split)
    resume(DataSource(phantoms), tmp_path / "resumed", longer)
    start(DataSource(phantoms), tmp_path / "straight", longer, split_file=split)
    one, other = (load_newest(tmp_path / name / "checkpoints", "last") for name in ("resumed", "straight"))
    assert one is not None
    assert other is not None
    assert one.step == other.step == 3
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in other.weights)


def test_the_model_card_states_what_is_predicted(presence_run: Path) -> None:
    assert "Presence of ET in a case" in (presence_run / "MODEL_CARD.md").read_text()


def test_slabs_get_their_labels_from_the_voxels_of_the_batch() -> None:
    config = load_config("presence", [*TINY, *SLABS])
    facts = {
        "spacing_mm": [4, 4, 4],
        "presence": {"labels": {}, "weight_absent": [1.0, 1.0], "weight_present": [1.0, 1.0]},
    }
    masks = torch.zeros(2, 3, 40, 48, 6)
    masks[0, 0, :4, :2, 0] = 1  # 8 voxels of 0.064 ml
    batch = Batch(image=torch.zeros(2, 4, 40, 48, 6), masks=masks, present=torch.ones(2, 4).bool(), cases=("a", "b"))
    assert Presence(config, facts).target(batch).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_slabs_are_trained_on_and_predicted_with_their_positions(
    phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    start(DataSource(phantoms), tmp_path / "run", load_config("presence", [*TINY, *SLABS]))
    case = sorted(phantoms.iterdir())[0]
    assert znormseg("predict", tmp_path / "run", case, tmp_path / "out", "--device", "cpu").code == 0
    slabs = json.loads((tmp_path / "out" / f"{case.name}.json").read_text())["slabs"]
    assert all(slab["to_mm"] - slab["from_mm"] == pytest.approx(24, abs=1) for slab in slabs)
    assert set(slabs[0]["probability"]) == {"WT", "ET"}


# Bad input


def test_a_missing_column_is_named(phantoms: Path, tmp_path: Path, table: Table, cases: list[str]) -> None:
    with pytest.raises(DataError, match=r"labels\.csv: no column IDH; its columns are case, grade, ET"):
        started(phantoms, tmp_path / "run", table(rows_of(cases)), "task.outputs=[IDH]")
    assert not (tmp_path / "run").exists()


def test_a_single_class_is_refused(phantoms: Path, tmp_path: Path, table: Table, cases: list[str]) -> None:
    with pytest.raises(DataError, match=r"ET is present in all \d training cases"):
        started(phantoms, tmp_path / "run", table(rows_of(cases)), "task.outputs=[ET]")


def test_a_single_class_in_the_label_maps_is_refused(phantoms: Path, tmp_path: Path) -> None:
    config = load_config("presence", [*TINY, "task.outputs=[WT]"])
    with pytest.raises(DataError, match=r"WT is present in all . training cases \(WT of at least 0\.5 ml"):
        start(DataSource(phantoms), tmp_path / "run", config)


def test_a_slab_label_may_be_present_in_every_case_but_not_in_none() -> None:
    from app.config.task import TaskConfig
    from app.training.presence_labels import require_both_classes

    task = TaskConfig(name="presence", outputs=("WT", "ET"), by_slab=True)
    require_both_classes(task, {"a": (1, 0), "b": (1, 1)}, ["a", "b"])
    with pytest.raises(DataError, match="ET is absent in all 2 training cases"):
        require_both_classes(task, {"a": (1, 0), "b": (1, 0)}, ["a", "b"])


def test_a_case_without_a_row_is_named(phantoms: Path, tmp_path: Path, table: Table, cases: list[str]) -> None:
    with pytest.raises(DataError, match=f"no row for 1 case: {cases[-1]}"):
        started(phantoms, tmp_path / "run", table(rows_of(cases)[:-1]))


def test_a_row_without_a_case_is_named(phantoms: Path, tmp_path: Path, table: Table, cases: list[str]) -> None:
    with pytest.raises(DataError, match="1 row for cases that are not in the data set: nobody"):
        started(phantoms, tmp_path / "run", table([*rows_of(cases), "nobody,1,1"]))


@pytest.mark.parametrize("value", ["2", "", "yes", "0.5", "nan"])
def test_a_value_other_than_0_or_1_is_named(
    phantoms: Path, tmp_path: Path, table: Table, cases: list[str], value: str
) -> None:
    lines = [*rows_of(cases)[:-1], f"{cases[-1]},{value},1"]
    with pytest.raises(DataError, match=f"line 7, case {cases[-1]}: grade is '{value}'; allowed are 0"):
        started(phantoms, tmp_path / "run", table(lines))


def test_two_rows_for_a_case_are_refused(phantoms: Path, tmp_path: Path, table: Table, cases: list[str]) -> None:
    with pytest.raises(DataError, match=f"two rows for case {cases[0]}, the second in line 8"):
        started(phantoms, tmp_path / "run", table([*rows_of(cases), f"{cases[0]},0,1"]))


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("network.architecture=unet", "presence needs resnet10, resnet18, resnet50"),
        ("task.outputs=[IDH]", "IDH is not a region"),
        ("task.threshold_ml=[0]", "above 0"),
        ("task.threshold_ml=[1, 2]", "one number, or one for each"),
        ("network.channels=[4, 8]", "a ResNet has 4 stages"),
        ("network.slices=4", "need task.by_slab=true"),
        ("training.patch_voxels=[40, 48, 4]", "only slabs"),
    ],
)
def test_incompatible_settings_are_refused(setting: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        load_config("presence", [*TINY, setting])


def test_segmentation_refuses_a_resnet() -> None:
    with pytest.raises(ConfigError, match=r"resnet10 cannot do task\.name=segmentation"):
        load_config("laptop", ["network.architecture=resnet10", "network.channels=[4, 4, 4, 4]"])


def test_cases_without_label_maps_can_be_trained_on_with_a_table(
    phantoms: Path, tmp_path: Path, cases: list[str], table: Table
) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    for path in data.rglob("*_seg.nii.gz"):
        path.unlink()
    started(data, tmp_path / "run", table(rows_of(cases)))
    assert list((tmp_path / "run" / "checkpoints").glob("best-*.json"))


# Prediction and scores


def test_a_prediction_gives_a_probability_and_a_decision(predictions: Path, cases: list[str]) -> None:
    content = json.loads((predictions / f"{cases[0]}.json").read_text())
    assert 0 <= content["probability"]["ET"] <= 1
    assert content["present"]["ET"] == (content["probability"]["ET"] >= 0.5)
    assert content["decisions"]["ET"]["tuned"] is False


def test_a_prediction_conforms_to_its_schema(predictions: Path, cases: list[str]) -> None:
    content = json.loads((predictions / f"{cases[0]}.json").read_text())
    jsonschema.Draft202012Validator(json_schema("presence")).validate(content)


def test_the_table_has_a_row_for_each_case(predictions: Path, cases: list[str]) -> None:
    with (predictions / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == cases
    assert set(rows[0]) == {"case", "ET", "ET_present"}


def test_finished_cases_are_kept_and_modified_results_are_not(
    presence_run: Path, phantoms: Path, tmp_path: Path, cases: list[str], znormseg: Call
) -> None:
    arguments = ("predict", presence_run, phantoms / cases[0], tmp_path / "out", "--device", "cpu", "--json")
    znormseg(*arguments)
    assert json.loads(znormseg(*arguments).out)["skipped"] == [cases[0]]
    path = tmp_path / "out" / f"{cases[0]}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "probability": {"ET": 0.99}}))
    assert json.loads(znormseg(*arguments).out)["skipped"] == []


def test_evaluate_gives_every_metric_with_its_interval_and_a_page(
    predictions: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("evaluate", predictions, phantoms, "--json", "--page", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    measures = json.loads(ended.out)["measures"]["ET"]
    assert set(measures) == {"auroc", "auprc", "accuracy", "sensitivity_at_specificity", "f1", "brier", "ece"}
    assert "ROC" in (tmp_path / "page.html").read_text()


def test_evaluate_accepts_a_table_as_reference(
    predictions: Path, table: Table, cases: list[str], znormseg: Call
) -> None:
    labels = table(["case,ET", *(f"{case},{number % 2}" for number, case in enumerate(cases))])
    ended = znormseg("evaluate", predictions, labels, "--json")
    assert [case["present"]["ET"] for case in json.loads(ended.out)["cases"]] == [0, 1, 0, 1, 0, 1]


def test_predictions_of_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        same: dict[str, Any] = {"probability": {"ET": 0.5}, "decisions": {"ET": {}}, "threshold_ml": None}
        (tmp_path / f"{name}.json").write_text(json.dumps({"case": name, **same, "weights_sha256": name}))
    with pytest.raises(DataError, match=r"b\.json: from another model than a\. Predict all cases"):
        read_presence_predictions(tmp_path)


def test_an_unsupported_option_of_0_is_also_refused() -> None:
    with pytest.raises(typer.BadParameter, match="--overlap cannot be used with RUN"):
        refuse_for_presence(Path("RUN"), {"--tta": False, "--device": None, "--overlap": 0.0})


@pytest.mark.parametrize("option", ["--tta", "--uncertainty", "--prepare"])
def test_predict_refuses_options_that_presence_does_not_have(
    presence_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call, option: str
) -> None:
    ended = znormseg("predict", presence_run, phantoms, tmp_path / "out", option)
    assert (ended.code, f"{option} cannot be used with" in " ".join(ended.err.split())) == (2, True)


# The gate


def test_a_gate_removes_enhancing_tumour_and_says_so(
    presence_run: Path, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = sorted(phantoms.iterdir())[0]
    ended = znormseg("predict", tiny_run, case, tmp_path / "out", "--presence", presence_run, "--device", "cpu")
    assert ended.code == 0, ended.err
    content = json.loads((tmp_path / "out" / f"{case.name}.json").read_text())
    gate = content["presence"]
    assert gate["removed"] == (gate["probability"] < gate["threshold"] == 0.5)
    assert not gate["removed"] or content["volumes_ml"]["ET"] == 0
    jsonschema.Draft202012Validator(json_schema("predict")).validate(content)


@pytest.fixture
def gated(presence_run: Path, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> Callable[[], Any]:
    """Predict a phantom with and without a gate; return both label maps and the JSON of the gated one."""
    case = sorted(phantoms.iterdir())[0]

    def predict(name: str, *more: Any) -> Any:
        assert znormseg("predict", tiny_run, case, tmp_path / name, *more, "--device", "cpu").code == 0
        stored: Any = nib.load(tmp_path / name / f"{case.name}.nii.gz")
        return np.asarray(stored.dataobj)

    def both() -> Any:
        plain, found = predict("plain"), predict("gated", "--presence", presence_run)
        return plain, found, json.loads((tmp_path / "gated" / f"{case.name}.json").read_text())

    return both


@pytest.mark.parametrize("probability", [0.2, 0.7, 0.9])
def test_a_gate_turns_enhancing_tumour_into_core_below_its_threshold_and_changes_nothing_else(
    gated: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, probability: float
) -> None:
    answer = GateAnswer(probability=probability, threshold=0.7, tuned=True, run="RUN2", weights_sha256="0")
    monkeypatch.setattr(Gate, "answer", lambda *_: answer)
    removes = probability < 0.7
    plain, found, content = gated()
    assert (plain == 4).any()
    assert np.array_equal(found, np.where(plain == 4, 1, plain) if removes else plain)
    assert content["presence"]["removed_ml"] == pytest.approx(0.064 * (plain == 4).sum() * removes, abs=1e-3)
    assert ("enhancing_removed" in [flag["code"] for flag in content["flags"]]) == removes


def test_a_case_without_a_contrast_that_the_gate_needs_is_refused(phantoms: Path, tmp_path: Path) -> None:
    from app.inference.batch.predict import PredictSteps
    from data.datasets.layouts import find_cases

    case = shutil.copytree(sorted(phantoms.iterdir())[0], tmp_path / "data" / "a")
    next(case.glob("*_t1ce.nii.gz")).unlink()
    gate: Any = SimpleNamespace(model=SimpleNamespace(origin="RUN2", takes_missing_contrasts=False))
    model: Any = SimpleNamespace(takes_missing_contrasts=True)
    steps = PredictSteps(model=model, output=tmp_path, runtime=cast("Any", None), settings={"options": {}}, gate=gate)
    with pytest.raises(DataError, match=r"^--presence RUN2: case .*: contrast t1c is missing"):
        steps.read(find_cases(tmp_path / "data")[0])


def test_a_segmentation_model_cannot_be_a_gate(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("predict", tiny_run, phantoms, tmp_path / "out", "--presence", tiny_run)
    assert (ended.code, "not a presence model" in ended.err) == (5, True)


@pytest.mark.parametrize(("name", "task"), [("starter", "segmentation"), ("mindgrab", "skull stripping")])
def test_a_published_model_given_as_a_gate_is_refused_with_its_kind(name: str, task: str) -> None:
    with pytest.raises(RunError, match=f"^{name}: a published model for {task}, not for presence. Give a run of"):
        load_presence(Path(name), cast("Any", None))


def test_the_config_of_a_presence_run_reads_back_the_same(presence_run: Path) -> None:
    config: RunConfig = load_config(str(presence_run / "config.yaml"))
    assert (config.task.name, config.outputs) == ("presence", ("ET",))


# Cross-validation, export, report


@pytest.fixture(scope="module")
def crossvalidated(phantoms: Path, cases: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-validation in two folds of a table of labels; tests must not modify it."""
    from app.experiments.crossval.presence import PresenceCrossValidation
    from app.experiments.crossval.run import cross_validate
    from app.reports.presence import write_presence_page

    folder = tmp_path_factory.mktemp("crossval")
    (folder / "labels.csv").write_text("\n".join([*rows_of(cases), ""]))
    settings = [*TINY, "training.steps=1", f"task.labels_csv={folder / 'labels.csv'}", "task.outputs=[grade]"]
    outcome = cross_validate(DataSource(phantoms), folder / "out", load_config("presence", settings), folds=2)
    assert isinstance(outcome, PresenceCrossValidation)
    write_presence_page(outcome.scores, outcome.page)
    return folder / "out"


def test_every_case_is_predicted_by_the_network_not_trained_on_it(crossvalidated: Path) -> None:
    for fold in (0, 1):
        split = json.loads((crossvalidated / "splits" / f"fold-{fold}.json").read_text())
        (best,) = (crossvalidated / f"fold-{fold}" / "checkpoints").glob("best-*.json")
        for case in split["validation"]:
            answer = json.loads((crossvalidated / "out-of-fold" / f"{case}.json").read_text())
            assert answer["weights_sha256"] == json.loads(best.read_text())["sha256"]


def test_the_ensemble_predicts_with_its_tuned_decision(crossvalidated: Path, phantoms: Path, tmp_path: Path) -> None:
    from app.system.device import RuntimeConfig, choose_runtime

    runtime = choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
    model = load_presence(crossvalidated / "ensemble", runtime)
    recorded = json.loads((crossvalidated / "crossval.json").read_text())["decisions"]["grade"]["decision"]
    assert vars(model.decisions["grade"]) == recorded
    assert (len(model.networks), model.decisions["grade"].tuned) == (2, True)


def test_a_finished_cross_validation_is_repeated_without_training(
    crossvalidated: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("report", crossvalidated, tmp_path / "pages")
    assert ended.code == 0, ended.err
    assert "calibration curve" in (tmp_path / "pages" / "index.html").read_text()


def test_a_presence_ensemble_makes_no_label_maps(crossvalidated: Path) -> None:
    from app.inference.ensemble import load_predictor
    from app.system.device import RuntimeConfig, choose_runtime

    with pytest.raises(RunError, match="a presence model, which makes no label maps"):
        load_predictor(crossvalidated / "ensemble", choose_runtime(RuntimeConfig(device="cpu")))


def test_the_page_of_a_run_shows_its_brier_score(presence_run: Path, tmp_path: Path, znormseg: Call) -> None:
    assert znormseg("report", presence_run, tmp_path / "pages").code == 0
    assert "1 - Brier score of each validation case" in (tmp_path / "pages" / "index.html").read_text()


def test_a_run_with_a_table_of_predictions_in_its_folder_is_still_a_run(
    presence_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    run = shutil.copytree(presence_run, tmp_path / "run")
    (run / "predictions.csv").touch()
    assert znormseg("report", run, tmp_path / "pages").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["openvino", "onnx"])
def test_an_exported_presence_network_agrees_with_the_original(
    presence_run: Path, phantoms: Path, tmp_path: Path, openvino_computes: None, file_format: str
) -> None:
    from app.exporting.export import export_run

    case = sorted(phantoms.iterdir())[0]
    exported = export_run(presence_run, tmp_path / "out", file_format=file_format, case=case)
    assert exported.parity.holds
    steps = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert steps["output"]["outputs"] == ["ET"]


def test_a_bundle_of_a_presence_network_is_refused(presence_run: Path, phantoms: Path, tmp_path: Path) -> None:
    from app.exporting.export import export_run

    with pytest.raises(RunError, match="bundles hold segmentations"):
        export_run(presence_run, tmp_path / "out", file_format="monai-bundle", case=sorted(phantoms.iterdir())[0])


@pytest.mark.slow
def test_gradient_rules_are_compared_by_brier_score(
    phantoms: Path, tmp_path: Path, cases: list[str], znormseg: Call
) -> None:
    split = {"train": [*cases[:2], cases[4]], "validation": [cases[3]], "test": [cases[5]]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    sets = [word for setting in TINY if "steps" not in setting for word in ("--set", setting)]
    arms = ("--arms", "none,znorm", "--seeds", "1", "--steps", "1", "--learning-rates", "1e-3")
    place = ("compare", phantoms, tmp_path / "out", "--config", "presence", "--split", tmp_path / "split.json")
    ended = znormseg(*place, *arms, *sets)
    assert ended.code == 0, ended.err
    assert "1 - Brier score of the test cases" in ended.out
