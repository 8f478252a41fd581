"""Load a trained network with everything needed to apply it; also defines the base class of all predictors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from app.errors import ConfigError, RunError
from app.inference.backends.executors import Engine, TorchEngine, make_engine
from app.inference.backends.graph import GRAPH_KEY, Graph, graph_from_json
from app.inference.calibration import NOT_CALIBRATED, Calibration
from app.inference.postprocess import Postprocess
from app.inference.sliding_window.grid import Size
from app.progress import LOG
from app.runs.checkpoints import Saved, load_newest, load_newest_arrays
from app.runs.model_card import STATEMENT_KEY, is_presence
from app.system.device import Runtime
from data.labels import CONTRASTS, CONVENTIONS, REGIONS, LabelConvention
from data.nifti import Spacing

# Modules that import torch are imported where they are used, since prediction with OpenVINO does not need torch.
if TYPE_CHECKING:
    from app.config.load import RunConfig
    from app.inference.backends.torch_backend import GraphNetwork


#: Keys that every version so far has in the ``network`` section of its configs. Only these are checked, because
#: reading a whole config would need torch.
_NETWORK_KEYS: Final = {"architecture", "channels", "dropout"}


@dataclass(frozen=True, kw_only=True)
class ModelStatement:
    """Name and known limits of a published or imported model."""

    name: str
    limits: tuple[str, ...]
    """Caveats for readers of its label maps, one sentence each; may be empty."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a result file."""
        return {"name": self.name, "limits": list(self.limits)}


def statement_from_json(content: Mapping[str, Any] | None) -> ModelStatement | None:
    """Read a model's statement; None for a network trained with this program, which has none.

    Raises:
        KeyError, TypeError: the content does not have the expected form.
    """
    if content is None:
        return None
    return ModelStatement(name=str(content["name"]), limits=tuple(map(str, content.get("limits", ()))))


@dataclass(frozen=True, kw_only=True)
class Predictor(ABC):
    """Predicts label maps: one network, or the mean of several."""

    plain_config: Mapping[str, Any]
    """Config of the training run, as stored in the checkpoint."""
    origin: str
    """Folder of the run or the ensemble, for messages."""
    takes_missing_contrasts: bool
    """Whether it was trained to predict when contrasts are missing."""
    spacing_mm: Spacing
    """Voxel spacing that the networks work at."""
    convention: LabelConvention
    """Meaning of the label numbers in the training data."""
    sha256: str
    """SHA-256 of the weights."""
    postprocess: Postprocess = field(default_factory=Postprocess)
    """Rules that turn probabilities into masks; by default, probabilities are cut at one half."""
    calibration: Calibration = NOT_CALIBRATED
    """Temperatures for probabilities, and intervals for volumes."""
    statement: ModelStatement | None = None
    """None for a network trained with this program."""

    @cached_property
    def config(self) -> RunConfig:
        """Config of the training run; imports torch.

        Raises:
            RunError: the config does not fit this version.
        """
        from app.config.load import from_plain

        try:
            return from_plain(dict(self.plain_config), self.origin)
        except ConfigError as error:
            raise _does_not_fit(self.origin, error) from error

    @abstractmethod
    def members(self) -> Iterator[Model]:
        """Yield the networks; a caller that drops each before the next holds only one at a time."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return the entries for a result file that describe the weights and the post-processing."""


@dataclass(frozen=True, kw_only=True)
class Model(Predictor):
    """A network ready to predict; it is not calibrated, since its validation cases were used to choose its weights."""

    engine: Engine
    """The network and the backend that runs it."""
    window: Size
    """Patch size that the network was trained on, in voxels."""
    overlap: float
    """Share of a window that its neighbour also covers, as in the run's validations."""
    crop: bool
    """Whether the network sees only the bounding box of the brain instead of the whole volume."""
    step: int

    @property
    def network(self) -> GraphNetwork:
        """The network as a torch module in eval mode; its state dict is that of the trained network."""
        assert isinstance(self.engine, TorchEngine), "loaded for a backend other than torch"
        return self.engine.network

    def members(self) -> Iterator[Model]:
        """Yield this network."""
        yield self

    def record(self) -> dict[str, Any]:
        """Return the SHA-256 and the step of the weights."""
        return {"weights_sha256": self.sha256, "weights_step": self.step}


def load_model(run: Path, runtime: Runtime) -> Model:
    """Load the network of a run: the best on its validation cases, or the last if it had none.

    Args:
        run: folder that ``train`` made; training may still be running.
        runtime: backend, device and precision to load the network for.

    Raises:
        RunError: the folder does not exist, or its weights are missing, were changed or do not fit this version.
    """
    if not run.is_dir():
        raise RunError(f"{run}: {'not a folder' if run.exists() else 'does not exist'}; give the folder of a run")
    load = load_newest_arrays if runtime.backend == "openvino" else load_newest
    checkpoint: Saved[Any] | None = load(run / "checkpoints", "best")
    if checkpoint is None:
        if not (run / "config.yaml").exists():
            raise RunError(
                f"{run}: not the folder of a run, a model or an ensemble. Give one that train or crossval made."
            )
        raise RunError(
            f"{run}: no weights yet. Wait for the run's first validation; if it was interrupted, resume it: "
            f"znormseg train DATA {run} --resume"
        )
    details = checkpoint.details
    if is_presence(details.get("config", {})):
        raise no_label_maps(run)
    try:
        if details["contrasts"] != list(CONTRASTS) or details["regions"] != list(REGIONS):
            raise RunError(
                f"{run}: trained for other contrasts or regions: {details['contrasts']}, {details['regions']}"
            )
        plain = details["config"]
        if missing := _NETWORK_KEYS - plain["network"].keys():
            raise ValueError(f"its config has no network.{', network.'.join(sorted(missing))}")
        takes_missing_contrasts = float(plain.get("augment", {}).get("contrast_dropout", 0)) > 0
        if details.get("takes_missing_contrasts", False) != takes_missing_contrasts:
            raise ValueError("takes_missing_contrasts and augment.contrast_dropout contradict each other")
        convention = CONVENTIONS[details["labels"]]
        x, y, z = details["spacing_mm"]
        width, depth, height = (int(side) for side in plain["training"]["patch_voxels"])
        graph = graph_from_json(details[GRAPH_KEY]) if GRAPH_KEY in details else _traced(run, plain)
        channels = len(CONTRASTS) * (2 if takes_missing_contrasts else 1)
        if graph.in_channels != channels:
            raise ValueError(f"its network takes {graph.in_channels} channels, but {channels} are needed")
        engine = make_engine(graph, checkpoint.weights, runtime)
        overlap = float(plain["inference"]["overlap"])
        crop = bool(plain["inference"].get("crop", True))
        statement = statement_from_json(details.get("imported") or details.get(STATEMENT_KEY))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ConfigError) as error:
        if isinstance(error, RunError):
            raise
        raise _does_not_fit(str(run), error) from error
    return Model(
        engine=engine,
        plain_config=plain,
        origin=str(run),
        window=(width, depth, height),
        overlap=overlap,
        crop=crop,
        takes_missing_contrasts=takes_missing_contrasts,
        spacing_mm=(x, y, z),
        convention=convention,
        sha256=checkpoint.sha256,
        step=checkpoint.step,
        statement=statement,
    )


def no_label_maps(folder: Path) -> RunError:
    """The error for a presence model where one that makes label maps is needed."""
    return RunError(
        f"{folder}: a presence model, which makes no label maps. Give a segmentation; to limit its enhancing tumour, "
        f"add --presence {folder} to znormseg predict."
    )


def _does_not_fit(origin: str, error: Exception) -> RunError:
    return RunError(f"{origin}: the weights do not fit this version ({error}). Train again.")


def _traced(run: Path, plain: dict[str, Any]) -> Graph:
    """Trace the graph from the network's code, for a run saved by a version that did not store it.

    Raises:
        ConfigError: the config of the run does not fit this version.
    """
    from app.config.load import from_plain
    from app.inference.backends.trace import trace_of

    LOG.info("%s: saved by a version that did not store the network's graph; tracing it takes a few seconds", run)
    config = from_plain(plain, str(run))
    return trace_of(config.network, in_channels=config.input_channels)
