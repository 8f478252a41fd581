"""Training in several processes started by ``torchrun``; a single process is the special case of one.

Every process holds the whole network and computes its share of each batch. Gradients are averaged once per step, in
the backward pass of its last micro-batch. All processes decide together when to stop or when a budget in hours has
ended; only the first one writes. Control messages use gloo, GPU tensors nccl. gloo notices at once that a process is
gone, and waits for hours for work of one process; nccl does neither. So whatever may take long, such as waiting for a
full disk, is followed by a control message before the next GPU tensor is sent.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from app.errors import DeviceError
from app.progress import LOG

T = TypeVar("T")

#: Timeout for the processes to find each other; torchrun starts them once all hosts are present.
_JOIN_TIMEOUT: Final = timedelta(minutes=5)
#: Timeout for work of one process that the others wait for, such as preparing a large data set.
_TIMEOUT: Final = timedelta(hours=12)
#: Timeout for tensors: all processes send theirs within a step, so one that is this late is lost.
_TENSOR_TIMEOUT: Final = timedelta(minutes=20)
#: Environment variables that ``torchrun`` sets for each process.
_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A process's place in a ``torchrun`` launch."""

    rank: int = 0
    """Rank of the process, from 0."""
    size: int = 1
    """Number of processes."""
    local_rank: int | None = None
    """Rank of the process on its host, which is also its GPU index; None without ``torchrun``."""
    local_size: int = 1
    """Number of processes on its host."""
    restarts: int = 0
    """How often ``torchrun`` has restarted the processes."""
    job: str = ""
    """Identifies the launch, also after a restart; empty without ``torchrun``."""


def launched(environment: Mapping[str, str]) -> Launch:
    """Read the environment variables of ``torchrun``; if any is missing, describe a single process.

    Raises:
        DeviceError: a variable is not a number, or the rank is not below the number of processes.
    """
    if any(not environment.get(name) for name in _VARIABLES):
        return Launch()
    rank, size, local = (_number(environment, name, 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= size:
        raise DeviceError(
            f"RANK {rank} and WORLD_SIZE {size}: ranks are counted from 0. Start the processes with torchrun."
        )
    job = environment.get("TORCHELASTIC_RUN_ID", "")
    return Launch(
        rank=rank,
        size=size,
        local_rank=local,
        local_size=_number(environment, "LOCAL_WORLD_SIZE", 1),
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        # Without --rdzv-id all launches share one id; the launcher's process id distinguishes them.
        job=job if job not in ("", "none") else f"{socket.gethostname()}:{os.getppid()}",
    )


class World:
    """The processes that train together, as one of them sees them; a single process never waits."""

    def __init__(
        self, launch: Launch | None = None, *, restarts: int = 0, tensors: dist.ProcessGroup | None = None
    ) -> None:
        """Set up a world.

        ``restarts`` is the maximum over all processes, as a host that joined later counts from 0. ``tensors`` is the
        group that sends tensors; None for the default group.
        """
        self.launch = launch if launch is not None else Launch()
        self.rank, self.size = self.launch.rank, self.launch.size
        self.restarts = max(restarts, self.launch.restarts)
        self._seconds = 0.0
        self._tensors = tensors

    @property
    def is_first(self) -> bool:
        """Whether this process writes for all of them."""
        return self.rank == 0

    # Collective: every process must call these together

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, differentiably.

        Incoming gradients are assumed to be equal in all processes, as they are when all compute the same function of
        the sum. They are multiplied by the number of processes, so that the averaged parameter gradients equal those
        of one process with all the patches.
        """
        return values if self.size == 1 else _Total.apply(values, self.size, self._tensors)  # type: ignore[no-untyped-call]

    def means(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each number over all processes; NaN if it is NaN in any of them."""
        if self.size == 1:
            return list(values)
        return [total / self.size for total in self._reduced(values, dist.ReduceOp.SUM)]

    def largest(self, value: float) -> float:
        """Return the maximum of a number over all processes."""
        return value if self.size == 1 else self._reduced([value], dist.ReduceOp.MAX)[0]

    def rows(self, count: int, row_of: Callable[[int], Sequence[float]]) -> list[list[float]]:
        """Compute the rows of a table, divided among the processes, and return the whole table in each of them.

        Args:
            count: number of rows, at least one.
            row_of: computes the row of an index; all rows have the same length.
        """
        mine = {index: list(row_of(index)) for index in range(self.rank, count, self.size)}
        if self.size == 1:
            return [mine[index] for index in range(count)]
        width = int(self.largest(max(map(len, mine.values()), default=0)))
        flat = [value for index in range(count) for value in mine.get(index, [0.0] * width)]
        summed = self._reduced(flat, dist.ReduceOp.SUM)
        return [summed[index * width : (index + 1) * width] for index in range(count)]

    def agree(self, *, seconds: float, signal_name: str | None, save: bool) -> tuple[str | None, bool]:
        """Adopt the first process's clock in all of them, and combine their stop and save requests.

        Args:
            seconds: time spent, by this process's clock.
            signal_name: the signal that asked this process to stop, or None.
            save: whether this process was asked to save.

        Returns:
            the signal that asked any process to stop, or None, and whether any was asked to save.
        """
        if self.size == 1:
            return signal_name, save
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        requests = [float(save), *(float(signal_name == name) for name in names)]
        summed = self._reduced([seconds if self.is_first else 0.0, *requests], dist.ReduceOp.SUM)
        self._seconds, saving, *counts = summed
        return next((name for name, count in zip(names, counts, strict=True) if count), None), saving > 0

    def broadcast(self, content: T | None = None) -> T:
        """Broadcast ``content`` from the first process; the others pass nothing and wait for it."""
        box = [content]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        assert box[0] is not None
        return box[0]

    def wait(self) -> None:
        """Block until every process has called this."""
        self.largest(0.0)

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Require that facts are equal in all processes.

        Raises:
            DeviceError: a fact differs; the message names it and two differing values.
        """
        if self.size == 1:
            return
        table: list[Mapping[str, object]] = [{}] * self.size
        dist.all_gather_object(table, dict(facts))
        for name in facts:
            for rank, other in enumerate(table):
                if other[name] != table[0][name]:
                    raise DeviceError(
                        f"processes must agree: {name} is {table[0][name]} in process 0 and {other[name]} in process "
                        f"{rank}. Use identical hosts and installations, or set it in the config."
                    )

    # Local: no process waits for another

    def shares(self, items: Sequence[T]) -> list[Sequence[T]]:
        """Return this process's share, in two rounds, of work whose results all processes need.

        The first round divides the items among all processes, for hosts that share a file system; the second among the
        processes of each host, for hosts that do not. A single process gets no rounds.
        """
        if self.size == 1:
            return []
        local = self.launch.local_rank or 0
        return [items[self.rank :: self.size], items[local :: self.launch.local_size]]

    def seconds(self, own: float) -> float:
        """Return the time spent: ``own`` in a single process, else the value last agreed on."""
        return own if self.size == 1 else self._seconds

    def replica(self, network: nn.Module) -> nn.Module:
        """Wrap the network for training, so that its backward pass averages gradients over the processes."""
        if self.size == 1:
            return network
        device = next(network.parameters()).device
        return DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self._tensors,
            gradient_as_bucket_view=True,
        )

    def gradients(self, replica: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Context for the forward and backward pass of a micro-batch; only the ``last`` one averages gradients."""
        if last or not isinstance(replica, DistributedDataParallel):
            return nullcontext()
        context: AbstractContextManager[None] = replica.no_sync()
        return context

    def seed_step(self, seed: int, step: int) -> None:
        """Seed the random numbers of a step (dropout), except in the first process, which keeps its sequence.

        The sequence depends only on seed, rank and step, so a resumed run repeats it.
        """
        if not self.is_first:
            torch.manual_seed(int(np.random.SeedSequence([seed, self.rank, step]).generate_state(1)[0]))

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        table = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(table, operation)
        return table.tolist()


#: The world of a process that ``torchrun`` did not start.
ALONE: Final = World()


@contextmanager
def joined_processes() -> Iterator[World]:
    """Join the other processes of a launch for the duration of the block; all but the first log errors only.

    Raises:
        DeviceError: another process cannot be reached, or ended while this one waited for it.
    """
    launch = launched(os.environ)
    if launch.size == 1:
        yield World(launch)
        return
    tensors = _set_up(launch)
    level = LOG.level
    try:
        # Strides of 1x1x1 weights with channels innermost are ambiguous: torch copies the gradients, which is harmless.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        try:
            restarts = torch.tensor(launch.restarts)
            dist.all_reduce(restarts, dist.ReduceOp.MAX)
            if launch.rank > 0:
                LOG.setLevel(logging.ERROR)
            yield World(launch, restarts=int(restarts), tensors=tensors)
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            raise DeviceError(
                f"process {launch.rank} of {launch.size}: another process ended, or cannot be reached. See the "
                "messages of the process that ended first; a run that has a checkpoint can be resumed."
            ) from error
    finally:
        LOG.setLevel(level)
        dist.destroy_process_group()


class _Total(torch.autograd.Function):
    """All-reduce whose backward pass needs no second all-reduce; see :meth:`World.total`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.size = size
        summed = values.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.size, None, None


def _set_up(launch: Launch) -> dist.ProcessGroup:
    """Join the other processes; return the group for tensors. The default group is for control messages."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # a run may still be set to a CPU
        if launch.local_rank is not None and launch.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(launch.local_rank)
    try:
        store, rank, size = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
        place = fresh_store(store, rank=rank, size=size)
        dist.init_process_group("gloo", store=place, rank=rank, world_size=size, timeout=_TIMEOUT)
        group: dist.ProcessGroup = dist.new_group(backend=backend, timeout=_TENSOR_TIMEOUT)
        return group
    except (RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise DeviceError(
            f"process {launch.rank} of {launch.size} could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({first}). Hosts must reach each other's ports; GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME name the network interface."
        ) from error


def fresh_store(store: Store, *, rank: int, size: int) -> Store:
    """Return an empty part of the launch's store, the same one in all processes.

    The store may outlive a restart, and then still holds the addresses of dead processes. Hosts may count restarts
    differently, so the first process invents a name and sends it to every process that asks. Each request has a unique
    token, so that leftover requests and answers of dead processes match nothing.

    Raises:
        TimeoutError: not every process arrived in time.
    """
    until = time.monotonic() + _JOIN_TIMEOUT.total_seconds()

    def pause() -> None:
        if time.monotonic() > until:
            raise TimeoutError("not all processes have joined")
        time.sleep(0.02)

    if rank > 0:
        question = secrets.token_hex(8)
        store.set(f"znormseg/asks/{rank}", question)
        while not store.check([f"znormseg/name/{question}"]):
            pause()
        name = store.get(f"znormseg/name/{question}").decode()
        store.set(f"znormseg/came/{name}/{rank}", "")
        return PrefixStore(name, store)
    name = secrets.token_hex(8)
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"znormseg/came/{name}/{other}"]):
                missing.discard(other)
            elif store.check([f"znormseg/asks/{other}"]):
                store.set(f"znormseg/name/{store.get(f'znormseg/asks/{other}').decode()}", name)
        pause()
    return PrefixStore(name, store)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a process of the group is gone; gloo has no exception for this, only a message text."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise DeviceError(
            f"environment variable {name}: expected a number, got {text!r}. Start the processes with torchrun."
        )
    return int(text)
