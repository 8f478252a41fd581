"""Model cards: every model folder has a description for people, the same one for programs, and checksums.

::

    MODEL_CARD.md   data, configuration, metrics, limits and licence, in words
    model.json      the same as plain data
    SHA256SUMS      checksums of both and of the model's files; check them with ``sha256sum -c SHA256SUMS``

The card states only facts that are recorded in the folder, and says which ones are missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from app import NOTICE
from app.errors import RunError
from app.runs.folder import read_json, write_durably, write_json
from data.files import file_sha256
from data.filesystem import why

CARD_FILE: Final = "MODEL_CARD.md"
DESCRIPTION_FILE: Final = "model.json"
SUMS_FILE: Final = "SHA256SUMS"
#: Key in ``ensemble.json`` and in the JSON of weights under which a published model describes itself: ``name``,
#: ``description``, ``data``, ``metrics``, ``limits``, ``licence``. Imported weights have the same under ``imported``.
STATEMENT_KEY: Final = "published"
#: Licence statement on the card of a network trained by this program.
LICENCE: Final = (
    "not stated. The program is Apache-2.0; the licence of the weights is up to those who trained them, within the "
    "terms of the training data."
)
#: Limit of every network.
INPUT_LIMIT: Final = "Made for skull-stripped T1, T1c, T2 and FLAIR images on one grid."
#: Limit of every network trained by this program.
TESTED_LIMIT: Final = "Not tested on scanners, patients or diseases other than those of its validation cases, if any."
#: Limit of networks with several validations, of which the best one's weights were kept.
#: To be formatted with the name of the measure.
CHOSEN_LIMIT: Final = (
    "The weights were chosen on the validation cases, so their {} is somewhat better than that of new cases."
)

#: Files of a run, an ensemble or one of its networks that are checksummed, besides checkpoints. Metrics, TensorBoard
#: files and pages are left out, because they may change.
_PARTS: Final = ("config.yaml", "split.json", "labels.json", "run.json", "intensities.json", "ensemble.json")
_STARTED: Final = "weights started from those with SHA-256"
_LINE: Final = re.compile(r"(?P<sum>[0-9a-f]{64}) [ *](?P<name>.+)")


def describe_model(folder: Path) -> dict[str, Any]:
    """Describe a model from the files in its folder, as plain data.

    An export, which has a ``model.json`` but is neither a run nor an ensemble, is described by that file.

    Args:
        folder: folder of a run, an ensemble, an import or an export.

    Raises:
        RunError: the folder contains no model, or one of its files is damaged.
    """
    _require_folder(folder)
    best = newest_best(folder)
    if best is None and not (folder / "ensemble.json").exists() and not (folder / DESCRIPTION_FILE).exists():
        raise RunError(f"{folder}: contains no model (no weights, no ensemble.json, no {DESCRIPTION_FILE})")
    try:
        if best is not None:
            content = _of_run(folder, best)
        elif (folder / "ensemble.json").exists():
            content = _of_ensemble(folder)
        else:
            content = read_json(folder / DESCRIPTION_FILE)
        card(content)  # raises if the description is incomplete
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise RunError(f"{folder}: its files are damaged, or of another version ({error!r})") from error
    return content


def seal(folder: Path, description: Mapping[str, Any] | None = None, *, everything: bool = False) -> None:
    """Write the card, the description and the checksums of a model folder, replacing existing ones.

    Args:
        folder: model folder, complete except for these three files.
        description: the description to write; by default the result of :func:`describe_model`.
        everything: checksum every file in the folder, not only those that make up the model.

    Raises:
        RunError: as raised by :func:`describe_model`.
        OSError: the folder cannot be written to.
    """
    content = describe_model(folder) if description is None else dict(description)
    write_json(folder / DESCRIPTION_FILE, content)
    write_durably(folder / CARD_FILE, card(content).encode())
    paths = [path for path in folder.rglob("*") if path.is_file()] if everything else _own_files(folder)
    write_sums(folder, paths)


def unseal(folder: Path) -> None:
    """Remove the checksums before the model changes, so that they never contradict it."""
    (folder / SUMS_FILE).unlink(missing_ok=True)


def write_sums(folder: Path, paths: Iterable[Path]) -> None:
    """Write ``SHA256SUMS`` for files in a folder, in the format of ``sha256sum``."""
    names = sorted(path.relative_to(folder).as_posix() for path in paths if path.name != SUMS_FILE)
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names]
    write_durably(folder / SUMS_FILE, "".join(lines).encode())


def verify(folder: Path) -> tuple[str, ...]:
    """Verify every file that ``SHA256SUMS`` lists.

    Args:
        folder: model folder.

    Returns:
        the names of the verified files.

    Raises:
        RunError: ``SHA256SUMS`` is missing or damaged, or files are missing or changed; the message names each.
    """
    _require_folder(folder)
    place = folder / SUMS_FILE
    if not place.exists():
        raise RunError(
            f"{folder}: contains no {SUMS_FILE}, so nothing can be verified. Training writes it at the end; unfinished "
            "runs and those of older versions have none."
        )
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{place}: cannot be read ({why(error)})") from error
    listed: dict[str, str] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or Path(match["name"]).is_absolute() or ".." in Path(match["name"]).parts:
            raise RunError(f"{place}: damaged; invalid line: {line[:100]!r}. Restore the folder from a copy.")
        listed[match["name"]] = match["sum"]
    if not listed:
        raise RunError(f"{place}: damaged; it lists no file. Restore the folder from a copy.")
    missing = [name for name in listed if not (folder / name).is_file()]
    changed = [name for name in listed if name not in missing and file_sha256(folder / name) != listed[name]]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} was changed: its SHA-256 is not the one in {SUMS_FILE}" for name in changed]
    if problems:
        raise RunError(f"{folder}: {'; '.join(problems)}. Restore the folder from a copy.")
    return tuple(listed)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise RunError(
            f"{folder}: {'not a folder' if folder.exists() else 'does not exist'}; give the folder of a model"
        )


def newest_best(folder: Path) -> Path | None:
    """Return the JSON of the checkpoint that ``predict`` loads from a run; None if there is none."""
    pairs = sorted((folder / "checkpoints").glob("best-*.json"))
    return pairs[-1] if pairs else None


def card(description: Mapping[str, Any]) -> str:
    """Render a description as Markdown."""
    parts = [f"# {description['name']}", description["summary"], f"**{description['notice']}**"]
    for title in ("data", "network", "metrics", "weights", "export"):
        if content := description.get(title):
            parts += [f"## {title.capitalize()}", "\n".join(_rows(content))]
    parts += ["## Limits", "\n".join(f"- {limit}" for limit in description["limits"])]
    parts += ["## Licence", f"Of the weights: {description['licence']}"]
    return "\n\n".join(parts) + "\n"


def _own_files(folder: Path) -> Iterable[Path]:
    for name in (CARD_FILE, DESCRIPTION_FILE):
        if (folder / name).is_file():
            yield folder / name
    networks = {path.parent.parent for path in folder.glob("*/checkpoints/best-*.json")}
    for place in (folder, *networks):
        yield from (place / name for name in _PARTS if (place / name).is_file())
        if (best := newest_best(place)) is not None:
            yield best
            yield best.with_suffix(".safetensors")


def _of_run(folder: Path, best: Path) -> dict[str, Any]:
    weights = read_json(best)
    imported, published = weights.get("imported"), weights.get(STATEMENT_KEY)
    stated = imported or published or {}
    if imported is not None:
        origin = f"The weights are from another program: {imported['description']}"
        data, metrics = _input(weights), {}
    else:
        origin = " ".join(["Trained by znormseg.", *([published["description"]] if published else [])])
        data, metrics = _data(folder, weights), _metrics(weights)
    return {
        "kind": "run" if imported is None else "import",
        "name": stated.get("name", folder.resolve().name),
        "summary": f"{_purpose(weights['config'])} {origin}",
        "notice": NOTICE,
        "data": {**data, **stated.get("data", {})},
        "network": _network(weights["config"]),
        "metrics": {**metrics, **stated.get("metrics", {})},
        "weights": {"sha256": weights["sha256"], "step": weights["step"], "versions": weights["versions"]},
        "limits": [*stated.get("limits", ()), *_limits(weights)],
        "licence": stated.get("licence", LICENCE),
    }


def _of_ensemble(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "ensemble.json")
    networks = content["networks"]
    first = read_json(_best_of(folder / networks[0]["network"]))
    stated = content.get(STATEMENT_KEY) or {}
    mean = f"the mean of the {len(networks)} networks of a cross-validation."
    summary = f"Brain-tumour segmentation: {mean}"
    if is_presence(first["config"]):
        summary = f"{_purpose(first['config'])} The answer is {mean}"
    return {
        "kind": "ensemble",
        "name": stated.get("name", folder.resolve().name),
        "summary": f"{summary} {stated['description']}" if stated else summary,
        "notice": NOTICE,
        "data": {
            **_input(first),
            **_counts(folder),
            **_data_sets(content, first["config"]),
            **({_STARTED: content["init_from"]} if content.get("init_from") else {}),
            **stated.get("data", {}),
        },
        "network": _network(first["config"]),
        "metrics": _out_of_fold(content) | stated.get("metrics", {}),
        "weights": {one["network"]: one["weights_sha256"] for one in networks},
        "limits": [*stated.get("limits", ()), *_limits(first)],
        "licence": stated.get("licence", LICENCE),
    }


def _limits(weights: Mapping[str, Any]) -> Iterable[str]:
    """Return the limits that follow from the JSON of weights."""
    yield INPUT_LIMIT
    if weights.get("imported") is None:
        yield TESTED_LIMIT
        key, words = _measure(weights["config"])
        if weights[key] is not None and weights["config"]["training"]["validations"] > 1:
            yield CHOSEN_LIMIT.format(words)


def _best_of(folder: Path) -> Path:
    best = newest_best(folder)
    if best is None:
        raise RunError(f"{folder}: contains no weights. Restore the folder from a copy.")
    return best


def _input(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "contrasts": weights["contrasts"],
        "may lack contrasts": weights.get("takes_missing_contrasts", False),
        "regions": weights["regions"],
        "label convention": weights["labels"],
        "spacing in mm": weights["spacing_mm"],
    }


def _counts(folder: Path) -> dict[str, Any]:
    if not (folder / "split.json").exists():
        return {}
    split = read_json(folder / "split.json")
    return {"training cases": len(split["train"]), "validation cases": len(split["validation"])}


def _data_sets(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the data sets that a model was made from, if there are several or some are synthetic."""
    data_sets = record.get("data_sets", [])
    if not data_sets:
        return {}
    cases = [f"{one['cases']}{' with synthetic images' if one['synthetic'] else ''}" for one in data_sets]
    weights = config["data"].get("weights")
    return {
        "cases of each data set": cases,
        "label convention of each data set": [one["labels"] for one in data_sets],
        **({} if weights is None else {"patches of each data set in every cycle": weights}),
    }


def _data(folder: Path, weights: Mapping[str, Any]) -> dict[str, Any]:
    facts = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    content = {**_input(weights), **_counts(folder), **_data_sets(facts, weights["config"])}
    if facts.get("fold") is not None:
        content["fold"] = facts["fold"]
    if facts.get("init_from") is not None:
        content[_STARTED] = facts["init_from"]["sha256"]
    return content


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    training = config["training"]
    budget = {key: training[key] for key in ("steps", "hours") if training[key] is not None}
    return {
        **config["network"],
        "window in voxels": training["patch_voxels"],
        "overlap of windows": config["inference"]["overlap"],
        **{f"budget in {unit}": amount for unit, amount in budget.items()},
    }


def _out_of_fold(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of an ensemble's networks on cases that they were not trained on."""
    if is_presence(content.get("config", {})):
        return {f"out-of-fold AUROC {name}": value for name, value in content["out_of_fold_auroc"].items()}
    return {f"out-of-fold Dice of {one['network']}": one["out_of_fold_dice"] for one in content["networks"]}


def _metrics(weights: Mapping[str, Any]) -> dict[str, Any]:
    key, words = _measure(weights["config"])
    if weights[key] is None:
        return {f"validation {words}": "none: there were no validation cases"}
    return {f"validation {words} {output}": round(value, 4) for output, value in weights[key].items()}


def is_presence(config: Mapping[str, Any]) -> bool:
    """Whether a plain config is that of the presence task; runs of older versions have no task and segment."""
    return bool(config.get("task", {}).get("name") == "presence")


def _measure(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the key and the name of the measure by which the weights were chosen."""
    return ("one_minus_brier", "1 - Brier score") if is_presence(config) else ("dice", "Dice")


def _purpose(config: Mapping[str, Any]) -> str:
    if not is_presence(config):
        return "Brain-tumour segmentation: from four MRI contrasts to whole tumour, tumour core and enhancing tumour."
    whole = "each slab of slices" if config["task"]["by_slab"] else "a case"
    return f"Presence of {', '.join(config['task']['outputs'])} in {whole}, as a probability, from four MRI contrasts."


def _rows(content: Mapping[str, Any]) -> Iterable[str]:
    return (f"- {key}: {_in_words(value)}" for key, value in content.items())


def _in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_in_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
