"""The complete configuration of a run: all sections in one dataclass, loaded from YAML and strictly validated.

Precedence: a config file (named or by path), overridden by ``--set section.key=value``; there is no other source.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from app.config.gradient import GradientConfig
from app.config.inference import InferenceConfig
from app.config.task import MEASURES_OF_TASKS, Measure, TaskConfig
from app.config.training import TrainingConfig
from app.errors import ConfigError
from app.system.device import RuntimeConfig
from data.filesystem import why
from data.labels import CONTRASTS, REGIONS
from data.patches.augmentation import AugmentConfig
from models import PRESENCE_ARCHITECTURES, NetworkConfig, patch_divisor

#: Shortest side of a patch in voxels, except for the thickness of slabs.
_LEAST_SIDE: Final = 8


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Preparation of the cases."""

    spacing_mm: float | None = None
    """Isotropic voxel spacing at which the network works; null takes the median of the training cases."""
    nan_to_zero: bool = False
    """Replace NaN and infinite image voxels with 0 instead of rejecting the case."""
    weights: tuple[int, ...] | None = None
    """With several data sets, the number of patches from each in every cycle, such as ``[3, 1]``; null makes every case
    equally likely, whichever data set it is from."""

    def __post_init__(self) -> None:
        if self.weights is not None and not (self.weights and all(1 <= one <= 1000 for one in self.weights)):
            raise ValueError(f"data.weights: whole numbers from 1 to 1000, or null, got {list(self.weights)}")
        if self.spacing_mm is not None and not 0.25 <= self.spacing_mm <= 10:
            raise ValueError(f"data.spacing_mm: from 0.25 to 10 mm, or null, got {self.spacing_mm:g}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run except its data, fold and folder."""

    task: TaskConfig = field(default_factory=TaskConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=50_000))
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        self._require_fitting_task()
        divisor = patch_divisor(self.network)
        bad = [side for side in self.training.patch_voxels if side % divisor or side < 2 * divisor]
        if bad:
            raise ValueError(
                f"training.patch_voxels: {list(self.training.patch_voxels)} does not fit the network: with "
                f"{len(self.network.channels)} levels (network.channels) every side must be a multiple of {divisor}, "
                f"and at least {2 * divisor}"
            )

    def _require_fitting_task(self) -> None:
        """Require a network that can do the task, and patches that fit both."""
        network, patch = self.network, self.training.patch_voxels
        if (network.architecture in PRESENCE_ARCHITECTURES) != (self.task.name == "presence"):
            raise ValueError(
                f"network.architecture: {network.architecture} cannot do task.name={self.task.name}; presence needs "
                f"{', '.join(PRESENCE_ARCHITECTURES)}, segmentation any other"
            )
        if min(patch) < _LEAST_SIDE and not self.task.by_slab:
            raise ValueError(
                f"training.patch_voxels: from {_LEAST_SIDE} to 512 along each axis, got {list(patch)}; only slabs "
                "(task.by_slab) may be thinner"
            )
        if network.slices is None:
            return
        if not self.task.by_slab or network.slices != patch[2]:
            raise ValueError(
                f"network.slices: {network.slices} slices need task.by_slab=true and training.patch_voxels[2]="
                f"{network.slices}, got {list(patch)}"
            )
        if self.runtime.channels_last:
            raise ValueError("runtime.channels_last: true is for 3D convolutions; network.slices needs false")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the network's output channels: the regions, or what is present or absent."""
        return REGIONS if self.task.name == "segmentation" else self.task.outputs

    @property
    def measure(self) -> Measure:
        """The measure that chooses the weights."""
        return MEASURES_OF_TASKS[self.task.name]

    @property
    def takes_missing_contrasts(self) -> bool:
        """Whether the network accepts missing contrasts; if so, an extra channel per contrast marks its presence."""
        return self.augment.contrast_dropout > 0

    @property
    def input_channels(self) -> int:
        """Number of input channels of the network: one per contrast, doubled if presence channels are used."""
        return len(CONTRASTS) * (2 if self.takes_missing_contrasts else 1)


class _Document(BaseModel):
    """Applies pydantic's strict mode to the nested dataclasses, which do not depend on pydantic."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    run: RunConfig


def config_names() -> list[str]:
    """Return the names that ``--config`` accepts."""
    return sorted(
        Path(entry.name).stem for entry in resources.files("app.config.named").iterdir() if _is_yaml(entry.name)
    )


def purpose(name: str) -> str:
    """Return the purpose of a named config: the first sentence of the comment at the top of its file."""
    text, _ = _read(name)
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in head).partition(". ")[0].rstrip(".")


def load_config(
    name_or_path: str, overrides: Sequence[str] = (), *, sections: Mapping[str, Mapping[str, Any]] | None = None
) -> RunConfig:
    """Load a config and apply overrides.

    Args:
        name_or_path: one of :func:`config_names`, or the path of a YAML file.
        overrides: ``section.key=value``, with the value in YAML. Setting ``training.steps`` clears
            ``training.hours``, and vice versa.
        sections: values by section and key that replace those of the file before the overrides are applied.

    Raises:
        ConfigError: there is no such config, it is not YAML, a key is unknown, or a value has the wrong type or is
            out of range.
    """
    text, origin = _read(name_or_path)
    return parse_config(text, origin, overrides, sections=sections)


def parse_config(
    text: str,
    origin: str,
    overrides: Sequence[str] = (),
    *,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Parse a config from text, like :func:`load_config`; ``origin`` is its name in messages.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    try:
        content = _load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid YAML ({' '.join(str(error).split())})") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{origin}: a config is a mapping of sections, this is a {type(content).__name__}")
    for section, values in (sections or {}).items():
        content[section] = {**(content.get(section) or {}), **values}
    for override in overrides:
        _apply(content, override)
    return from_plain(content, origin)


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Return every key of a config as plain data."""
    return cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def to_yaml(config: RunConfig) -> str:
    """Return every key of a config as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None)


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the differences between two configs, each as ``section.key: old -> new``."""
    before, after = flat(old), flat(new)
    return [f"{key}: {before[key]} -> {after[key]}" for key in differing_keys(old, new)]


def flat(config: RunConfig) -> dict[str, Any]:
    """Return every value of a config as plain data, by ``section.key``."""
    return _flatten(to_plain(config))


def differing_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the ``section.key`` of every value that differs between two configs."""
    before, after = flat(old), flat(new)
    return [key for key in before if before[key] != after[key]]


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path in config_names():
        return (resources.files("app.config.named") / f"{name_or_path}.yaml").read_text(encoding="utf-8"), name_or_path
    path = Path(name_or_path)
    if not _is_yaml(path.name):
        close = difflib.get_close_matches(name_or_path, config_names(), n=1)
        raise ConfigError(
            f"config {name_or_path!r} is neither a named one ({', '.join(config_names())}) nor the path of a .yaml file"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {name_or_path}: cannot be read ({why(error)})") from error


class _Loader(yaml.SafeLoader):
    """Parses 1e-3 as a float (YAML 1.1 returns a string) and rejects duplicate keys and aliases.

    A duplicate key silently hides a value; a few lines of nested aliases can expand to more than fits in memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not supported, found *{self.peek_event().anchor}; write out the value")  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} appears twice, from line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _apply(content: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value``."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: expected section.key=value, such as training.steps=200")
    try:
        value = _load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML ({' '.join(str(error).split())})") from error
    place = content
    for section in path[:-1]:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    place[path[-1]] = value
    budget = {"steps": "hours", "hours": "steps"}
    if path[:-1] == ["training"] and path[-1] in budget and value is not None:
        place[budget[path[-1]]] = None


def from_plain(content: dict[str, Any], origin: str) -> RunConfig:
    """Return the config from the output of :func:`to_plain`; ``origin`` is its name in messages.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    try:
        text = json.dumps({"run": content}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: contains a value other than a number, text, list or mapping ({error})") from error
    try:
        return _Document.model_validate_json(text).run
    except ValidationError as error:
        raise ConfigError("\n".join(_in_words(detail, origin) for detail in error.errors())) from error


def _in_words(detail: Any, origin: str) -> str:
    """Word a pydantic error for the user: where it is, what was found and what is allowed."""
    path = ".".join(str(part) for part in detail["loc"][1:])
    if detail["type"] == "unexpected_keyword_argument":
        allowed = [key for key in _known_keys() if key.rpartition(".")[0] == path.rpartition(".")[0]]
        if path in ("training.minutes", "training.epochs"):
            return f"{origin}: unknown key {path}; the budget is training.hours (0.1 is six minutes) or training.steps"
        close = difflib.get_close_matches(path, allowed, n=1, cutoff=0.75)
        advice = (
            f"did you mean {close[0]}?"
            if close
            else f"allowed here: {', '.join(k.rpartition('.')[2] for k in allowed)}"
        )
        return f"{origin}: unknown key {path}; {advice}"
    text = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{origin}: {text}"
    return f"{origin}: {path}: {text[0].lower()}{text[1:]}, got {json.dumps(detail['input'])}"


def _known_keys() -> list[str]:
    """Return the dotted path of every section and key."""
    plain = to_plain(RunConfig())
    keys = list(_flatten(plain))
    return sorted({".".join(key.split(".")[:end]) for key in keys for end in range(1, key.count(".") + 2)})


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
