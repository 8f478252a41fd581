"""Write a network as an OpenVINO or ONNX file, and run that file on windows."""

from __future__ import annotations

import warnings
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from app.errors import ConfigError
from app.exporting.parity import Answer, Floats

if TYPE_CHECKING:
    import onnx

#: Names of the input, shape (N, contrasts, X, Y, Z), and the output, shape (N, regions, X, Y, Z); N is free.
INPUT: Final = "image"
OUTPUT: Final = "logits"
#: ONNX operator set; 18 is the first with the GroupNorm and Resize that the networks need.
OPSET: Final = 20
OPENVINO_FILE: Final = "model.xml"
ONNX_FILE: Final = "model.onnx"

_ONNX_PACKAGES: Final = ("onnx", "onnxruntime", "onnxscript")


def require_onnx() -> None:
    """Check that the packages that write and run ONNX are installed.

    Raises:
        ConfigError: one is missing; the message says how to install it.
    """
    if absent := [name for name in _ONNX_PACKAGES if util.find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {', '.join(absent)}. Install them: pip install 'znormseg[onnx]'")


def write_openvino(network: nn.Module, window: torch.Tensor, folder: Path) -> Answer:
    """Write ``model.xml`` and ``model.bin``, in float32, and read them back.

    Args:
        network: the network, on the CPU and in eval mode.
        window: an example window of shape (1, contrasts, X, Y, Z).
        folder: folder to write to.

    Returns:
        the network as OpenVINO computes it from these files.
    """
    # Not openvino.convert_model, which reports each conversion to Intel unless the user has opted out.
    import openvino as ov
    from openvino.frontend import FrontEndManager  # type: ignore[import-untyped]
    from openvino.frontend.pytorch.ts_decoder import (  # type: ignore[import-untyped]
        TorchScriptPythonDecoder,
    )

    from app.inference.backends.openvino_backend import openvino_core

    frontend = FrontEndManager().load_by_framework("pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer warns about shapes that are fixed here
        decoder = TorchScriptPythonDecoder(network, example_input=window)  # must outlive the conversion
        model = frontend.convert(frontend.load(decoder))
    model.reshape(ov.PartialShape([-1, *window.shape[1:]]))
    model.validate_nodes_and_infer_types()
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    ov.save_model(model, folder / OPENVINO_FILE, compress_to_fp16=False)
    compiled: Any = openvino_core().compile_model(
        folder / OPENVINO_FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    )

    def answer(image: Floats) -> Floats:
        return np.array(compiled(image)[OUTPUT])

    return answer


def write_onnx(network: nn.Module, window: torch.Tensor, folder: Path) -> Answer:
    """Write ``model.onnx``, in float32, check it, and read it back.

    Args:
        network: the network, on the CPU and in eval mode.
        window: an example window of shape (1, contrasts, X, Y, Z).
        folder: folder to write to.

    Returns:
        the network as ONNX Runtime computes it from the file.

    Raises:
        ConfigError: as raised by :func:`require_onnx`.
    """
    require_onnx()
    import onnx
    import onnxruntime

    path = folder / ONNX_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own internals
        program = torch.onnx.export(
            network,
            # Two windows: the exporter would treat a batch of one as fixed.
            (torch.cat([window, window]),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("windows")},),
            verbose=False,
        )
    assert program is not None
    onnx.save(_without_metadata(program.model_proto), path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(image: Floats) -> Floats:
        return np.asarray(session.run([OUTPUT], {INPUT: image})[0])

    return answer


def _without_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the exporter's notes from a model: stack traces with paths of this machine, and Python names."""
    graph = model.graph
    described = [model, *graph.initializer, *graph.input, *graph.output]
    for one in (graph, *model.functions):
        described += [one, *one.node, *one.value_info]
    for part in described:
        part.ClearField("metadata_props")
    return model
