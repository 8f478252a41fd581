"""A trained network, read from its run folder: weights, and all that is needed to apply them; or several of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from app.errors import ConfigError, RunError
from app.inference.backends.executors import Backend, TorchEngine, make_engine
from app.inference.backends.graph import GRAPH_KEY, Graph, graph_from_json
from app.inference.calibration import NOT_CALIBRATED, Calibration
from app.inference.postprocess import Postprocess
from app.inference.sliding_window.grid import Size
from app.progress import LOG
from app.runs.checkpoints import Saved, load_newest, load_newest_arrays
from app.system.device import Runtime
from data.labels import CONTRASTS, CONVENTIONS, REGIONS, LabelConvention
from data.nifti import Spacing

# What imports torch is imported where it is used: predicting with OpenVINO does without it.
if TYPE_CHECKING:
    from app.config.load import RunConfig
    from app.inference.backends.torch_backend import GraphNetwork


#: What every version so far has in this section; the whole config is read with torch alone.
_NETWORK_KEYS: Final = {"architecture", "channels", "dropout"}


class Predictor(Protocol):
    """What label maps are made with: one network, or the mean of several."""

    @property
    def plain_config(self) -> Mapping[str, Any]:
        """Of the training, as it is in the checkpoint."""
        ...

    @property
    def config(self) -> RunConfig:
        """Of the training."""
        ...

    @property
    def spacing_mm(self) -> Spacing:
        """What the networks work at."""
        ...

    @property
    def convention(self) -> LabelConvention:
        """What the training data's label numbers mean."""
        ...

    @property
    def sha256(self) -> str:
        """Of the weights."""
        ...

    @property
    def postprocess(self) -> Postprocess:
        """What is done with the probabilities."""
        ...

    @property
    def calibration(self) -> Calibration:
        """How far probabilities and volumes can be trusted."""
        ...

    @property
    def takes_missing_contrasts(self) -> bool:
        """Whether it was trained to do without some contrasts."""
        ...

    def members(self) -> Iterator[Model]:
        """The networks, one after the other; whoever lets go of one before the next holds one at a time."""
        ...

    def record(self) -> dict[str, Any]:
        """What a result file says of the weights and of post-processing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network ready to predict."""

    engine: Backend
    """Network and backend."""
    plain_config: Mapping[str, Any]
    """Of the training, as it is in the checkpoint."""
    origin: str
    """Folder of the run, for messages."""
    window: Size
    """The size the network was trained on, in voxels."""
    overlap: float
    """Share of a window that its neighbour covers too, as in the run's validations."""
    crop: bool
    """Whether it sees the brain's box alone, or the whole volume."""
    takes_missing_contrasts: bool
    """Whether it was trained to do without some contrasts."""
    spacing_mm: Spacing
    convention: LabelConvention
    """What the training data's label numbers mean."""
    sha256: str
    """Of the weights' file."""
    step: int

    @cached_property
    def config(self) -> RunConfig:
        """Of the training; imports torch.

        Raises:
            RunError: it is not one of this version.
        """
        return config_of(self.plain_config, self.origin)

    @property
    def network(self) -> GraphNetwork:
        """The network as a module of torch, in eval mode; its state dict is that of the network that was trained."""
        assert isinstance(self.engine, TorchEngine), "loaded for another backend than torch"
        return self.engine.network

    @property
    def postprocess(self) -> Postprocess:
        """None: probabilities are cut at one half."""
        return Postprocess()

    @property
    def calibration(self) -> Calibration:
        """None: there are no cases that it was not chosen on."""
        return NOT_CALIBRATED

    def members(self) -> Iterator[Model]:
        """Itself."""
        yield self

    def record(self) -> dict[str, Any]:
        """SHA-256 and step of the weights."""
        return {"weights_sha256": self.sha256, "weights_step": self.step}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What must be the same of networks that predict together, without their weights."""

    plain_config: Mapping[str, Any]
    takes_missing_contrasts: bool
    spacing_mm: Spacing
    convention: LabelConvention


def facts_of(model: Model) -> ModelFacts:
    """Of a network, so that it can be let go of."""
    return ModelFacts(
        plain_config=model.plain_config,
        takes_missing_contrasts=model.takes_missing_contrasts,
        spacing_mm=model.spacing_mm,
        convention=model.convention,
    )


def config_of(plain: Mapping[str, Any], origin: str) -> RunConfig:
    """The config of a checkpoint; imports torch.

    Raises:
        RunError: it is not one of this version.
    """
    from app.config.load import from_plain

    try:
        return from_plain(dict(plain), origin)
    except ConfigError as error:
        raise RunError(f"{origin}: the weights do not fit this version ({error}). Train again.") from error


def load_model(run: Path, runtime: Runtime) -> Model:
    """Load the network of a run: the best on its validation cases, or the last where it had none.

    Args:
        run: folder that ``train`` made; training may still go on.
        runtime: where the network goes.

    Raises:
        RunError: no such folder, no weights in it, weights that were changed, or not those of this program.
    """
    if not run.is_dir():
        raise RunError(f"{run}: {'not a folder' if run.exists() else 'does not exist'}; give the folder of a run")
    checkpoint: Saved[Any] | None
    if runtime.backend == "openvino":
        checkpoint = load_newest_arrays(run / "checkpoints", "best")
    else:
        checkpoint = load_newest(run / "checkpoints", "best")
    if checkpoint is None:
        if not (run / "config.yaml").exists():
            raise RunError(
                f"{run}: not the folder of a run, a model or an ensemble. Give one that train or crossval made."
            )
        raise RunError(
            f"{run}: no weights there yet. Wait for the run's first validation; if it was interrupted, go on with it: "
            f"znormseg train DATA {run} --resume"
        )
    details = checkpoint.details
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
            raise ValueError(f"its network takes {graph.in_channels} channels, {channels} are needed")
        engine = make_engine(graph, checkpoint.weights, runtime)
        overlap = float(plain["inference"]["overlap"])
        crop = bool(plain["inference"].get("crop", True))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ConfigError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{run}: the weights do not fit this version ({error}). Train again.") from error
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
    )


def _traced(run: Path, plain: dict[str, Any]) -> Graph:
    """The graph of a run of a version that did not write it, from the network's own code.

    Raises:
        ConfigError: its config is not one of this version.
    """
    from app.config.load import from_plain
    from app.inference.backends.trace import trace_of

    LOG.info("%s: of a version that kept no graph of the network; it is made from the code, which takes seconds", run)
    config = from_plain(plain, str(run))
    return trace_of(config.network, in_channels=config.input_channels)
