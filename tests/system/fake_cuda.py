"""Tensors that only pretend to be on a GPU, for a torch without CUDA, and a count of what the host does with them.

FakeTensorMode gives each operation the shape, dtype, device and strides that CUDA would give it, without numbers. So it
finds tensors on different devices, dtypes that do not fit together, every place where the host waits for the GPU, and
every byte that is copied to it. It finds nothing that happens inside a kernel: no speed, no memory, no streams, no
NCCL, no non-deterministic algorithm.

A CPU build of torch refuses autograd on CUDA tensors in two places, which :func:`allow_autograd` changes in the memory
of this process: there is no device guard for CUDA, and the engine asks an accelerator that does not exist for its
streams. Therefore use this module only in scripts that tests start as separate processes.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

#: The repository; a wait is attributed to the innermost of its lines.
ROOT: Final = Path(__file__).parents[2]
_PACKAGES: Final = tuple(f"{ROOT / package}/" for package in ("app", "data", "models", "znorm"))
_LAST: Final = torch.channels_last_3d
#: Operations whose result has a shape that depends on the data: the host waits for it.
_SHAPED_BY_DATA: Final = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
#: Device types of c10/core/DeviceType.h.
_CUDA, _META = 1, 14
#: Machine code of a function that returns false.
_RETURN_FALSE: Final = {"x86_64": b"\x31\xc0\xc3", "aarch64": bytes.fromhex("00008052c0035fd6")}


def allow_autograd() -> None:
    """Let this process run autograd on fake CUDA tensors.

    Raises:
        RuntimeError: this torch has CUDA.
        OSError: the system refuses to make torch's code writable.
    """
    libraries = Path(torch.__file__).parent / "lib"
    guards = (ctypes.c_void_p * 32).in_dll(
        ctypes.CDLL(str(libraries / "libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
    )
    if guards[_CUDA]:
        raise RuntimeError("this torch has CUDA")
    guards[_CUDA] = guards[_META]
    library = ctypes.CDLL(str(libraries / "libtorch_cpu.so"))
    is_accelerator = library["_ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE"]
    address = ctypes.cast(is_accelerator, ctypes.c_void_p).value
    assert address is not None
    code = _RETURN_FALSE[platform.machine()]
    page = address & ~(mmap.PAGESIZE - 1)
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(page), 2 * mmap.PAGESIZE, everything) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.memmove(address, code, len(code))


def is_cuda(value: object) -> bool:
    """Whether a value is a tensor on a (fake) GPU."""
    return isinstance(value, Tensor) and value.device.type == "cuda"


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def is_ndhwc(tensor: Tensor) -> bool:
    """Whether a volume has its channels innermost."""
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=_LAST)


class Watch(TorchDispatchMode):
    """Counts what happens between host and GPU within :func:`fake_cuda`.

    ``finite`` is the answer to every question about values: a read number is 1 if it is True, 0 otherwise.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.finite = True
        self.pinned: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.waits: Counter[str] = Counter()
        """Times that the host waited for the GPU, by kind and line of code."""
        self.uploads: Counter[str] = Counter()
        """Copies to the GPU, by line of code."""
        self.uploaded_bytes = 0
        self.pageable_bytes = 0
        """Bytes uploaded from memory that is not pinned; such a copy blocks the host."""
        self.launches = 0
        """Operations on the GPU, views excluded."""
        self.moved_bytes = 0
        """Bytes that these operations read and write."""
        self.layout_bytes = 0
        """Bytes read and written only to turn NCDHW into NDHWC or back."""
        self.pinned.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation on fake tensors and count it."""
        kwargs = kwargs or {}
        if _is_composite(func):  # in inference mode operations arrive whole
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(map(is_cuda, inputs))
        if func is aten._local_scalar_dense.default:
            if on_gpu:
                self._waits_for("number")
            number = args[0]
            one = 1.0 if number.dtype.is_floating_point else 1
            return one if self.finite else 0 * one
        if func is aten.equal.default and on_gpu:
            self._waits_for("comparison")
            return True
        if on_gpu and _is_shaped_by_data(func, args):
            self._waits_for("shape")
        if func in (aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr):  # has no rule for fake tensors
            self.launches += 1
            return None
        out = _as_cudnn_would(func, args, func(*args, **kwargs))
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func in (aten._to_copy.default, aten.copy_.default):
            source, target = (args[0], out) if func is aten._to_copy.default else (args[1], args[0])
            waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
            self._copied(source, target, waits=waits)
        elif (on_gpu or any(map(is_cuda, outputs))) and func.namespace == "aten" and not func.is_view:
            self._launched(func, args, inputs, outputs)
        return out

    def report(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        return {
            "waits": sum(self.waits.values()),
            "waits_at": dict(self.waits),
            "uploads": dict(self.uploads),
            "uploaded_bytes": self.uploaded_bytes,
            "pageable_bytes": self.pageable_bytes,
            "launches": self.launches,
            "moved_bytes": self.moved_bytes,
            "layout_bytes": self.layout_bytes,
        }

    def _waits_for(self, kind: str) -> None:
        self.waits[f"{kind} at {_line_of_ours()}"] += 1

    def _copied(self, source: Tensor, target: Tensor, *, waits: bool) -> None:
        if is_cuda(target) and not is_cuda(source) and source.numel():
            pinned = any(source is one for one in self.pinned)
            count = tensor_bytes(source)
            self.uploads[f"{'pinned' if pinned else 'pageable'} at {_line_of_ours()}"] += 1
            self.uploaded_bytes += count
            # Without pinned memory, the driver copies before it returns, regardless of non_blocking.
            if not pinned:
                self.pageable_bytes += count
            if waits or not pinned:
                self._waits_for("upload")
        if is_cuda(source) and not is_cuda(target):
            self._waits_for("download")
        if is_cuda(source) and is_cuda(target):
            self.launches += 1
            self.moved_bytes += tensor_bytes(source) + tensor_bytes(target)

    def _launched(self, func: Any, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if func is aten.detach.default:
            return
        self.launches += 1
        if not str(func).startswith(("aten.empty", "aten.new_empty")):
            self.moved_bytes += sum(tensor_bytes(tensor) for tensor in [*inputs, *outputs] if is_cuda(tensor))
        if func is aten.clone.default and outputs[0].dim() == 5 and inputs[0].stride() != outputs[0].stride():
            self.layout_bytes += 2 * tensor_bytes(outputs[0])
        # A convolution with NDHWC weights turns its other arguments into NDHWC first.
        if func is aten.convolution.default and is_ndhwc(args[1]) and not is_ndhwc(args[0]):
            self.layout_bytes += 2 * tensor_bytes(args[0])
        if func is aten.convolution_backward.default and is_ndhwc(args[2]):
            self.layout_bytes += sum(2 * tensor_bytes(one) for one in args[:2] if not is_ndhwc(one))


@contextmanager
def fake_cuda(watch: Watch) -> Iterator[None]:
    """Context in which ``torch.device("cuda:0")`` works on fake tensors, with autograd, autocast and GradScaler.

    Call :func:`allow_autograd` before. Tensors from before the block stay what they are: on a CPU, with numbers.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # imports modules that must not see what is patched below
    with ExitStack() as stack:
        enter: Callable[[Any], Any] = stack.enter_context
        enter(warnings.catch_warnings())
        enter(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        enter(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
        enter(mock.patch("torch.cuda.Stream", _FakeStream))
        enter(mock.patch("torch.cuda.Event", _FakeEvent))
        enter(mock.patch("torch.cuda.stream", nullcontext))
        enter(mock.patch("torch.cuda.current_stream", _FakeStream))
        enter(mock.patch("torch.Generator", _generator))
        enter(mock.patch.object(nn.Module, "_apply", _apply))
        enter(mock.patch.object(Tensor, "record_stream"))
        enter(mock.patch.object(Tensor, "is_pinned", lambda tensor, *_: any(tensor is one for one in watch.pinned)))
        enter(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: _pinned(tensor, watch)))
        enter(mock.patch.object(Tensor, "numpy", _numpy_of(Tensor.numpy)))
        enter(mode)
        enter(torch.autograd.set_multithreading_enabled(False))  # else the engine asks for the queue of GPU 0
        enter(watch)
        yield


class _FakeStream:
    """A stream or an event that has always finished."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_stream(self, *_: object) -> None: ...
    def wait_event(self, *_: object) -> None: ...
    def record_event(self, *_: object) -> _FakeEvent:
        return _FakeEvent()


class _FakeEvent:
    def __init__(self, *_: object, **__: object) -> None: ...
    def record(self, *_: object) -> None: ...
    def wait(self, *_: object) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


_Generator: Final = torch.Generator


def _generator(*_: object, **__: object) -> torch.Generator:
    """A CPU's generator in the place of a GPU's, which a CPU build cannot make."""
    return _Generator()


def _pinned(tensor: Tensor, watch: Watch) -> Tensor:
    copy = tensor.clone()
    watch.pinned.append(copy)
    return copy


def _numpy_of(real: Callable[..., Any]) -> Callable[..., Any]:
    def numpy(tensor: Tensor, *args: object, **options: object) -> Any:
        if not isinstance(tensor, FakeTensor):
            return real(tensor, *args, **options)
        assert not is_cuda(tensor), "numpy() of a tensor on the GPU"
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    return numpy


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Module._apply for fake parameters, whose data cannot be swapped."""
    del recurse
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = function(parameter.detach())
            module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _is_composite(func: Any) -> bool:
    return func.namespace == "aten" and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def _is_shaped_by_data(func: Any, args: tuple[Any, ...]) -> bool:
    if func is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return func in _SHAPED_BY_DATA


def _as_cudnn_would(func: Any, args: tuple[Any, ...], out: Any) -> Any:
    """Give the result of a convolution the layout that cuDNN chooses; the rule for fake tensors answers NCDHW."""
    if func is aten.convolution.default and is_cuda(out) and (is_ndhwc(args[1]) or is_ndhwc(args[0])):
        return out.contiguous(memory_format=_LAST)
    if func is aten.convolution_backward.default and is_cuda(args[0]) and (is_ndhwc(args[2]) or is_ndhwc(args[1])):
        return tuple(one if one is None or one.dim() != 5 else one.contiguous(memory_format=_LAST) for one in out)
    return out


def _line_of_ours() -> str:
    """The innermost line of the repository's packages on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(_PACKAGES):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "a test"
