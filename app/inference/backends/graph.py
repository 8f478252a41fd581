"""A network as plain data: a list of operations, each with the names of its weights.

A trained network is stored as its weights and this list in JSON, so that neither the code that built it nor torch is
needed to run it. Value 0 is the image, value i the result of operation i; the last result is the answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from pydantic import StrictFloat, StrictInt, TypeAdapter, ValidationError

from app.errors import first_problem

Kind = Literal[
    "conv", "conv_transpose", "instance_norm", "group_norm", "prelu", "leaky_relu", "relu", "cat", "add", "interpolate"
]
Triple = tuple[int, int, int]

#: Key of a network's graph in the JSON of a checkpoint.
GRAPH_KEY: Final = "graph"

#: By kind: number of input values, required weights, optional weights, required settings. Settings whose names end in
#: ``s`` are three integers, one per axis.
_FORMS: Final[Mapping[str, tuple[int, AbstractSet[str], AbstractSet[str], AbstractSet[str]]]] = {
    "conv": (1, {"weight"}, {"bias"}, {"strides", "paddings", "dilations"}),
    "conv_transpose": (1, {"weight"}, {"bias"}, {"strides", "paddings", "output_paddings"}),
    "instance_norm": (1, set(), {"weight", "bias"}, {"epsilon"}),
    "group_norm": (1, {"weight", "bias"}, set(), {"epsilon", "group_count"}),
    "prelu": (1, {"weight"}, set(), set()),
    "leaky_relu": (1, set(), set(), {"slope"}),
    "relu": (1, set(), set(), set()),
    "cat": (2, set(), set(), set()),
    "add": (2, set(), set(), set()),
    "interpolate": (1, set(), set(), {"factors"}),
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One step of a network."""

    kind: Kind
    """``cat`` joins two values along channels; ``interpolate`` is linear, with half-voxel centres."""
    inputs: tuple[int, ...]
    """Numbers of the input values."""
    weights: Mapping[str, str]
    """By role (``weight``, ``bias``): name in the checkpoint."""
    settings: Mapping[str, StrictInt | StrictFloat | Triple]
    """Strides, paddings, epsilon, ...: a number, or three integers, one per axis."""

    def __post_init__(self) -> None:
        count, needed, optional, settings = _FORMS[self.kind]
        if len(self.inputs) != count:
            raise ValueError(f"{self.kind} takes {count} values, got {len(self.inputs)}")
        if not needed <= set(self.weights) <= needed | optional:
            raise ValueError(f"{self.kind} has weights {sorted(self.weights)}")
        if set(self.settings) != settings:
            raise ValueError(f"{self.kind} has settings {sorted(self.settings)}, needs {sorted(settings)}")
        for name, value in self.settings.items():
            if name.endswith("s") != isinstance(value, tuple):
                needed_form = "three integers" if name.endswith("s") else "a number"
                raise ValueError(f"{self.kind}: {name} must be {needed_form}, got {value!r}")
            if isinstance(value, tuple) and not all(0 <= number <= 64 for number in value):
                raise ValueError(f"{self.kind}: {name} must be from 0 to 64, got {value!r}")

    def triple(self, name: str) -> Triple:
        """Return a setting of three integers."""
        value = self.settings[name]
        assert isinstance(value, tuple)
        return value


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Operations of a network, in the order of computation."""

    version: Literal[1] = 1
    """Version of the format."""
    in_channels: int
    """Channels of the image, value 0, of shape (N, in_channels, X, Y, Z)."""
    operations: tuple[Operation, ...]

    def __post_init__(self) -> None:
        if not self.operations:
            raise ValueError("the network has no operations")
        for number, operation in enumerate(self.operations, 1):
            if not all(0 <= value < number for value in operation.inputs):
                raise ValueError(f"operation {number} takes the values {operation.inputs}, which are not computed yet")

    def weight_names(self) -> set[str]:
        """Return the names of all weights that are used."""
        return {name for operation in self.operations for name in operation.weights.values()}

    def require_weights(self, names: Collection[str]) -> None:
        """Check that no weight is missing.

        Raises:
            ValueError: weights are missing; the message names one of them.
        """
        if missing := sorted(self.weight_names() - set(names)):
            raise ValueError(f"{len(missing)} weights are missing, among them {missing[0]}")

    def steps(self) -> Iterator[tuple[int, Operation, tuple[int, ...]]]:
        """Yield the number and the operation of each step, and the values that are no longer needed after it."""
        last = {value: number for number, operation in enumerate(self.operations, 1) for value in operation.inputs}
        for number, operation in enumerate(self.operations, 1):
            yield number, operation, tuple(value for value in set(operation.inputs) if last[value] == number)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for :func:`graph_from_json`."""
        return asdict(self)


_GRAPH: Final = TypeAdapter(Graph)


def graph_from_json(content: Mapping[str, Any]) -> Graph:
    """Return the graph from the output of :meth:`Graph.to_json`.

    Raises:
        ValueError: the content is not valid, or of another version.
    """
    try:
        return _GRAPH.validate_python(content)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error


Shape = tuple[int, ...]


def out_channels(graph: Graph, shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    """Return the number of channels of every value, starting with the image.

    Args:
        graph: the operations.
        shapes: shapes of the weights, by name.
    """
    channels = [graph.in_channels]
    for operation in graph.operations:
        given = [channels[value] for value in operation.inputs]
        if operation.kind == "conv":
            channels.append(shapes[operation.weights["weight"]][0])
        elif operation.kind == "conv_transpose":
            channels.append(shapes[operation.weights["weight"]][1])
        else:
            channels.append(sum(given) if operation.kind == "cat" else given[0])
    return tuple(channels)


def coarseness(graph: Graph) -> tuple[Triple, ...]:
    """Return, for every value from the image on, how many image voxels one of its voxels spans along each axis."""
    spans = [(1, 1, 1)]
    for operation in graph.operations:
        x, y, z = spans[operation.inputs[0]]
        if operation.kind == "conv":
            a, b, c = operation.triple("strides")
            spans.append((x * a, y * b, z * c))
        elif operation.kind in ("conv_transpose", "interpolate"):
            a, b, c = operation.triple("strides" if operation.kind == "conv_transpose" else "factors")
            spans.append((x // a, y // b, z // c))
        else:
            spans.append((x, y, z))
    return tuple(spans)


def divisor(graph: Graph) -> int:
    """Return the number of voxels that every side of a window must be a multiple of."""
    return max(max(span) for span in coarseness(graph))


def live_values(graph: Graph, shapes: Mapping[str, Shape]) -> float:
    """Return how many numbers per voxel of a window are held at most, if values are freed as in :meth:`Graph.steps`.

    Example: two convolutions from 4 to 16 to 3 channels hold 4 + 16, then 16 + 3 numbers: at most 20.
    """
    channels, spans = out_channels(graph, shapes), coarseness(graph)
    sizes = [count / (x * y * z) for count, (x, y, z) in zip(channels, spans, strict=True)]
    held, most = sizes[0], sizes[0]
    for number, _, spent in graph.steps():
        held += sizes[number]
        most = max(most, held)
        held -= sum(sizes[value] for value in spent)
    return most
