"""A network as plain data: a list of operations, each with the names of its weights.

A trained network is then its weights and this list, stored as JSON, so that neither the code that built it nor torch is
needed to compute it. Value 0 is the image, value i the result of operation i; the last result is the answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

Kind = Literal[
    "conv",
    "conv_transpose",
    "instance_norm",
    "group_norm",
    "prelu",
    "leaky_relu",
    "relu",
    "cat",
    "add",
    "interpolate",
]

VERSION: Final = 1
#: Key of a network's graph in the JSON of a checkpoint.
GRAPH_KEY: Final = "graph"

#: By kind: number of input values, required weights, optional weights, required settings. Settings whose names end in
#: ``s`` are three integers, one per axis.
_FORMS: Final[dict[str, tuple[int, frozenset[str], frozenset[str], frozenset[str]]]] = {
    "conv": (1, frozenset({"weight"}), frozenset({"bias"}), frozenset({"strides", "paddings", "dilations"})),
    "conv_transpose": (
        1,
        frozenset({"weight"}),
        frozenset({"bias"}),
        frozenset({"strides", "paddings", "output_paddings"}),
    ),
    "instance_norm": (1, frozenset(), frozenset({"weight", "bias"}), frozenset({"epsilon"})),
    "group_norm": (1, frozenset({"weight", "bias"}), frozenset(), frozenset({"epsilon", "group_count"})),
    "prelu": (1, frozenset({"weight"}), frozenset(), frozenset()),
    "leaky_relu": (1, frozenset(), frozenset(), frozenset({"slope"})),
    "relu": (1, frozenset(), frozenset(), frozenset()),
    "cat": (2, frozenset(), frozenset(), frozenset()),
    "add": (2, frozenset(), frozenset(), frozenset()),
    "interpolate": (1, frozenset(), frozenset(), frozenset({"factors"})),
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
    settings: Mapping[str, Any]
    """Strides, paddings, epsilon, ...: a number, or three integers, one per axis."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"operation {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        count, needed, optional, settings = _FORMS[self.kind]
        if len(self.inputs) != count:
            raise ValueError(f"{self.kind} takes {count} values, got {len(self.inputs)}")
        if not needed <= set(self.weights) <= needed | optional:
            raise ValueError(f"{self.kind} has weights {sorted(self.weights)}")
        if set(self.settings) != settings:
            raise ValueError(f"{self.kind} has settings {sorted(self.settings)}, it needs {sorted(settings)}")
        for name, value in self.settings.items():
            if name.endswith("s"):
                if len(value) != 3 or not all(type(number) is int and 0 <= number <= 64 for number in value):
                    raise ValueError(f"{self.kind}: {name} is {value!r}, three whole numbers are needed")
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{self.kind}: {name} is {value!r}, a number is needed")

    def triple(self, name: str) -> tuple[int, int, int]:
        """A setting of three integers."""
        x, y, z = self.settings[name]
        return (x, y, z)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Operations of a network, in the order of computation."""

    in_channels: int
    """Channels of the image, value 0, of shape (N, in_channels, X, Y, Z)."""
    operations: tuple[Operation, ...]

    def __post_init__(self) -> None:
        if not self.operations:
            raise ValueError("a network of no operations")
        for number, operation in enumerate(self.operations, 1):
            if not all(0 <= value < number for value in operation.inputs):
                raise ValueError(f"operation {number} takes the values {operation.inputs}, which are not there yet")

    def weight_names(self) -> set[str]:
        """Names of all weights that are used."""
        return {name for operation in self.operations for name in operation.weights.values()}

    def require_weights(self, names: Collection[str]) -> None:
        """Check that no weight is missing.

        Raises:
            ValueError: weights are missing; the message names one of them.
        """
        if missing := sorted(self.weight_names() - set(names)):
            raise ValueError(f"{len(missing)} weights are missing, among them {missing[0]}")

    def steps(self) -> Iterator[tuple[int, Operation, tuple[int, ...]]]:
        """Number and operation of each step, and the values that are not needed after it."""
        last = {value: number for number, operation in enumerate(self.operations, 1) for value in operation.inputs}
        for number, operation in enumerate(self.operations, 1):
            yield number, operation, tuple(value for value in set(operation.inputs) if last[value] == number)

    def to_json(self) -> dict[str, Any]:
        """Plain data for :func:`graph_from_json`."""
        return {
            "version": VERSION,
            "in_channels": self.in_channels,
            "operations": [
                {
                    "kind": operation.kind,
                    "inputs": list(operation.inputs),
                    "weights": dict(operation.weights),
                    "settings": {
                        name: list(value) if isinstance(value, tuple) else value
                        for name, value in operation.settings.items()
                    },
                }
                for operation in self.operations
            ],
        }


def graph_from_json(content: Mapping[str, Any]) -> Graph:
    """Inverse of :meth:`Graph.to_json`.

    Raises:
        KeyError, TypeError, ValueError: the content is not valid, or of another version.
    """
    if content["version"] != VERSION:
        raise ValueError(f"a network of version {content['version']}, this program reads version {VERSION}")
    return Graph(
        in_channels=int(content["in_channels"]),
        operations=tuple(
            Operation(
                kind=one["kind"],
                inputs=tuple(int(value) for value in one["inputs"]),
                weights={str(role): str(name) for role, name in one["weights"].items()},
                settings={
                    name: tuple(value) if isinstance(value, list) else value for name, value in one["settings"].items()
                },
            )
            for one in content["operations"]
        ),
    )


Shape = tuple[int, ...]


def out_channels(graph: Graph, shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    """Number of channels of every value, starting with the image.

    Args:
        graph: the operations.
        shapes: of the weights, by name.
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


def coarseness(graph: Graph) -> tuple[tuple[int, int, int], ...]:
    """For every value, starting with the image: how many image voxels one of its voxels spans along each axis."""
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
    """Number that every side of a window must be a multiple of, in voxels."""
    return max(max(span) for span in coarseness(graph))


def live_values(graph: Graph, shapes: Mapping[str, Shape]) -> float:
    """Most numbers that are held at once per voxel of a window, if values are freed as in :meth:`Graph.steps`.

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
