"""Options that several commands share, and checks of options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from app.evaluation.brats.challenge import ChallengeRules
    from app.system.device import RuntimeConfig
    from data.datasets.source import DataSource
    from data.labels import Contrast

T = TypeVar("T")


def panel(heading: str) -> partial[Any]:
    """Return ``typer.Option`` for options under a heading of the help."""
    return partial(typer.Option, rich_help_panel=heading)


def complete_config(incomplete: str) -> list[str]:
    """Complete the name of a config from the folder's entries, because importing app.config.load takes seconds."""
    names = (Path(entry.name).stem for entry in resources.files("app.config.named").iterdir() if ".yaml" in entry.name)
    return sorted(name for name in names if name.startswith(incomplete))


_input, _config, _scores, _output = map(panel, ("Input", "Config", "Scores", "Output"))
_LABELS = (
    "Label convention, if the data set does not determine it: brats2021, brats2023, brats2024, brats2024-ped, "
    "brats2015 or msd."
)

Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="Data set with label maps, in a layout that data check recognises.")
]
DataSets = Annotated[
    list[Path],
    typer.Argument(
        metavar="DATA",
        help="Data set with label maps, in a layout that data check recognises, or several. synthetic:DATA generates "
        "new images of its cases for every patch; such cases only train.",
    ),
]
Weights = Annotated[
    str | None,
    _input(
        metavar="N,N,...",
        help="Patches of each data set in every cycle, such as 3,1 (data.weights); default: every case is equally "
        "likely.",
    ),
]
Image = Annotated[Path | None, _input(help="Image of this contrast, instead of a case folder.")]
T1c = Annotated[Path | None, _input("--t1c", "--t1ce", help="Image of this contrast, instead of a case folder.")]
Labels = Annotated[str | None, _input(metavar="NAME", help=_LABELS)]
LabelsOfEach = Annotated[
    str | None, _input(metavar="NAME[,NAME...]", help=f"{_LABELS} Give one for all data sets, or one for each.")
]
LabelsOfTwo = Annotated[
    str | None, _input(metavar="NAME[,NAME]", help=f"{_LABELS} Give two for predictions and references.")
]
FollowLinks = Annotated[
    bool, _input("--follow-links", help="Accept symbolic links that point outside the given folders.")
]
NanToZero = Annotated[
    bool, _input("--nan-to-zero", help="Replace NaN and infinite voxels with 0 instead of rejecting the case.")
]
Config = Annotated[
    str | None,
    _config(
        "--config",
        "-c",
        help="laptop (default), unet, resunet, resunet-znorm, large, starter, presence, presence-slabs, or a YAML "
        "file.",
        autocompletion=complete_config,
    ),
]
Overrides = Annotated[
    list[str] | None,
    _config("--set", metavar="SECTION.KEY=VALUE", help="Override one key of the config; may be repeated."),
]
Rules = Annotated[
    str | None,
    _scores(
        metavar="YEAR",
        help="Score lesion by lesion, as in a challenge: brats2023, brats2024 or brats2026 (runs brats-evaluate).",
    ),
]
Task = Annotated[
    str | None,
    _scores(
        help="With --rules: GLI (default), PED, SSA, MEN, MET, MEN-RT; brats2026 has MEN-PRE and GOAT instead of SSA "
        "and MEN."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="Hardware")]


def _place(path: Path | None) -> Path | None:
    if path is not None:
        from app.evaluation.tables import require_table_place

        require_table_place(path)
    return path


Table = Annotated[Path | None, _output("--out", "-o", help="Write the table to a CSV file.", callback=_place)]
Page = Annotated[
    Path | None, _output(help="Write an HTML page with plots by case and the worst cases.", callback=_place)
]

PresencePage = Annotated[
    Path | None,
    typer.Option(
        help="Write a page with ROC and calibration curves.", rich_help_panel="Scores of presence", callback=_place
    ),
]


def refuse(wrong: object, message: str) -> None:
    """Refuse the command line if ``wrong`` is true.

    Raises:
        typer.BadParameter: with the message.
    """
    if wrong:
        raise typer.BadParameter(message)


def given(**by_contrast: T | None) -> dict[Contrast, T]:
    """Return the options that were given, keyed by contrast."""
    return {cast("Contrast", name): value for name, value in by_contrast.items() if value is not None}


def conventions(labels: str | None) -> tuple[str | None, str | None]:
    """Parse ``--labels NAME[,NAME]`` for two data sets; a single name applies to both.

    Example:
        >>> conventions("msd"), conventions("msd,brats2023"), conventions(None)
        (('msd', 'msd'), ('msd', 'brats2023'), (None, None))
    """
    first, comma, second = (labels or "").partition(",")
    return first or None, (second if comma else first) or None


def data_sets(data: Sequence[Path], labels: str | None, *, follow_links: bool) -> DataSource:
    """Return the data sets of a command, after applying ``--labels NAME[,NAME...]`` and ``--follow-links``."""
    from data.datasets.source import data_source

    source, names = data_source([str(one) for one in data], follow_links=follow_links), (labels or "").split(",")
    refuse(
        len(names) not in (1, len(data)),
        f"--labels: {len(names)} names for {len(data)} data sets; give one for all of them, or one for each",
    )
    return source if labels is None else source.with_labels(names * len(data) if len(names) == 1 else names)


def weights_override(weights: str | None, overrides: Sequence[str] | None = None) -> list[str]:
    """Return ``--weights`` as an override of the config.

    Args:
        weights: the option; None if it is not given.
        overrides: the values of ``--set``, which must not set the weights too.

    Example:
        >>> weights_override("3,1"), weights_override(None)
        (['data.weights=[3,1]'], [])
    """
    twice = weights is not None and any(one.partition("=")[0].strip() == "data.weights" for one in overrides or ())
    refuse(twice, "give either --weights or --set data.weights")
    refuse(
        weights is not None and re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", weights) is None,
        f"--weights takes whole numbers above 0, separated by commas, such as 3,1; got {weights!r}",
    )
    return [] if weights is None else [f"data.weights=[{weights}]"]


def challenge(rules: str | None, task: str | None) -> ChallengeRules | None:
    """Return the rules of a challenge, for ``--rules`` and ``--task``."""
    refuse(task is not None and rules is None, "--task requires --rules")
    from app.evaluation.brats.challenge import challenge_rules

    return None if rules is None else challenge_rules(rules, task or "GLI")


def runtime_config(device: str) -> RuntimeConfig:
    """Return the runtime config for ``--device``.

    Raises:
        ConfigError: there is no device of this name.
    """
    from app.errors import ConfigError
    from app.system.device import RuntimeConfig

    try:
        return RuntimeConfig(device=device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from error


def installed_model(run: Path) -> Path:
    """Return the model folder for RUN; if RUN is a published model that is not installed, download it."""
    from app.exporting.install import model_folder

    with terminal.watched() as on_progress:
        return model_folder(run, on_progress)


def mask_installed(mask: str | None) -> None:
    """Install the network that ``--mask`` names, if it names one."""
    if mask == "mindgrab":
        from app.exporting.install import install, published_model

        with terminal.watched() as on_progress:
            install(published_model(mask), on_progress=on_progress)
