"""Training in several processes that torchrun has started: who this one is, and what all of them agree on.

Every process runs the whole program on its part of each batch. The first, of rank 0, alone has a run and a voice; the
others take the loop's events in step with it. Without torchrun, and under it with one process, everything here leaves
its arguments as they are, and torch.distributed is not imported.

Tensors on a GPU travel by NCCL. Everything else, such as the question whether to stop, goes by gloo, so that no GPU has
to be waited for.

Sources: torch.distributed and torchrun (Torch Distributed Elastic), pytorch.org/docs; S. Li et al., "PyTorch
Distributed: Experiences on Accelerating Data Parallel Training", 2020, arXiv:2006.15704.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import io
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rlboard import errors
from rlboard.config import printable
from rlboard.errors import RlboardError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlboard.events import Events
    from rlboard.run import Stop

T = TypeVar("T")

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
ARRIVAL = datetime.timedelta(minutes=5)
"""How long the first process waits for the others to answer at all."""
PATIENCE = datetime.timedelta(minutes=30)
"""How long one may keep the others waiting, such as for a download or a slow disk; a dead one is noticed at once."""
GRACE_SECONDS = 10.0
FAILURE = "rlboard/failure"

_store: Any = None  # what torchrun keeps for all processes, once this one is connected


@dataclass(frozen=True)
class World:
    """rank: of this process among `size`. local_rank, local_size: the same among those of this machine.

    job: what one torchrun and its restarts have in common, empty without it. restarts: how many there have been.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    job: str = ""
    restarts: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of `count` things are this process's: the parts are disjoint, complete, and equal within one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


def world() -> World:
    """What torchrun says in the environment.

    Raises:
        UsageError: it says one half of it, or what cannot be.
    """
    given = os.environ
    known = [name for name in (*NUMBERS[:3], "TORCHELASTIC_RUN_ID") if given.get(name)]
    if not known:
        return World()
    if missing := [name for name in (*NUMBERS, *ADDRESS) if not given.get(name)]:
        both = f"{known[0]} is set in the environment, {missing[0]} is not"
        raise UsageError(f"{both}: start with torchrun, which sets all of them, or unset {known[0]}")
    for name in (*NUMBERS, "MASTER_PORT"):
        if not (given[name].isascii() and given[name].isdecimal() and len(given[name]) < 10):
            raise UsageError(f"{name}={printable(given[name])} in the environment is not a number: start with torchrun")
    rank, size, local_rank, local_size = (int(given[name]) for name in NUMBERS)
    if not (rank < size and local_rank < local_size <= size):
        told = ", ".join(f"{name}={given[name]}" for name in NUMBERS)
        raise UsageError(f"{told} in the environment cannot be: start with torchrun")
    restarts = given.get("TORCHELASTIC_RESTART_COUNT", "0")
    return World(rank, size, local_rank, local_size, _job(), int(restarts) if restarts.isdecimal() else 0)


def _job() -> str:
    """A name for the job that tells nothing else; where --rdzv-id gives none, torchrun's process stands for it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name == "none":
        name = f"{platform.node()} {os.getppid()}"
    return hashlib.sha256(name.encode()).hexdigest()[:16] if name else ""


def facts() -> dict[str, Any]:
    """What `run.json` says of the processes; nothing without torchrun."""
    here = world()
    return {"processes": here.size, "job": here.job} if here.job or here.size > 1 else {}


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Nothing is printed by any process but the first."""
    if _speaks():
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _speaks() -> bool:
    """Whether this is the first process, as far as the environment tells: it may be what is wrong."""
    rank = os.environ.get("RANK", "")
    return not (os.environ.get("WORLD_SIZE") and rank.isdecimal() and int(rank))


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """All processes are there, and can speak to each other, until the end.

    Raises:
        UsageError: torch cannot do it here, or the others are not there.
        RlboardError: another one has failed or vanished; the first process raises what that has said.
    """
    global _store
    here = world()
    if here.size == 1:
        yield
        return
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise UsageError("this torch has no gloo, by which processes speak to each other: start without torchrun")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    on_gpu = torch.cuda.is_available() and distributed.is_nccl_available()
    where = ":".join(printable(os.environ[name]) for name in ADDRESS)
    try:
        everybody, _, _ = next(rendezvous("env://", here.rank, here.size, timeout=ARRIVAL))
        _store = PrefixStore(_meeting(everybody, here), everybody)
        _store.set_timeout(PATIENCE)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        distributed.init_process_group(backend, store=_store, rank=here.rank, world_size=here.size, timeout=PATIENCE)
    except (RuntimeError, ValueError, TimeoutError) as error:
        why = printable(error, 200)
        raise UsageError(f"the {here.size} processes of torchrun do not find each other at {where}: {why}") from None
    try:
        yield
    except RuntimeError as error:
        if not is_silence(error):
            raise
        raise _failure_of_another() from None
    else:
        _store = None
        distributed.destroy_process_group()


def _meeting(store: Any, here: World) -> str:
    """A name that the processes which are here now have in common, and none that was here before a restart.

    torchrun keeps its store over restarts, and with it the addresses of the dead.

    Raises:
        TimeoutError, RuntimeError: another process does not come.
    """
    if not here.leads:
        ticket = uuid.uuid4().hex
        store.set(f"rlboard/ticket/{here.rank}", ticket)
        name = cast("str", store.get(f"rlboard/{ticket}").decode())
        store.set(f"{name}/{here.rank}", "here")
        return name
    name = f"rlboard/{uuid.uuid4().hex}"
    missing, late = set(range(1, here.size)), time.monotonic() + ARRIVAL.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"rlboard/ticket/{rank}"]):  # it may be that of a process which is no more
                store.set(f"rlboard/{store.get(f'rlboard/ticket/{rank}').decode()}", name)
            if store.check([f"{name}/{rank}"]):
                missing.remove(rank)
        if time.monotonic() > late:
            raise TimeoutError(f"process {min(missing)} has not come in {ARRIVAL.total_seconds():.0f} s")
        time.sleep(0.01)
    return name


def check_connected(command: str) -> None:
    """Raises UsageError where torchrun has started several processes of a command that knows nothing of others."""
    if world().size > 1 and _store is None:
        raise UsageError(f"rlboard {command} trains in one process here: start it without torchrun")


def is_silence(error: Exception) -> bool:
    """Whether `error` is what gloo, NCCL or the store raise when another process does not answer any more."""
    if not isinstance(error, RuntimeError) or world().size == 1:
        return False
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _failure_of_another() -> RlboardError:
    with contextlib.suppress(RuntimeError):
        if _store.check([FAILURE]):
            kind, _, message = _store.get(FAILURE).decode().partition(" ")
            return cast("RlboardError", getattr(errors, kind, RlboardError)(message))
    return RlboardError(
        "another process of this training has ended: torchrun says how; with --max-restarts it goes on from the "
        "newest checkpoint"
    )


def give_up(error: Exception) -> None:
    """Has the first process say why this one cannot go on, and waits for torchrun to end it. The first speaks itself.

    Whoever ended before the first had spoken would have torchrun silence that.
    """
    if _speaks():
        return
    if _store is not None:
        from torch import distributed

        with contextlib.suppress(RuntimeError):
            _store.set(FAILURE, f"{type(error).__name__} {error}")
        distributed.destroy_process_group()  # the others wait for this one no longer
    time.sleep(GRACE_SECONDS)


def share(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them; the others do not call it."""
    here = world()
    if here.size == 1:
        return make()
    import torch
    from torch import distributed

    made, file = make() if here.leads else None, io.BytesIO()
    torch.save(made, file)  # pickle alone cannot read back what a checkpoint is made of
    box = [file.getvalue()]
    distributed.broadcast_object_list(box, src=0)
    return cast("T", made if here.leads else torch.load(io.BytesIO(box[0]), weights_only=False))


def agree(value: object, complaint: str) -> None:
    """Raises UsageError with `complaint` where `value` differs from the first process's."""
    if share(lambda: value) != value:
        raise UsageError(complaint)


def sum_over(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor's sum over all processes, of its own type and shape, in one message of float64."""
    if world().size == 1:
        return tensors
    import torch
    from torch import distributed

    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return tuple(part.view(each.shape).to(each.dtype) for part, each in zip(parts, tensors, strict=True))


def gather(rows: Tensor, count: int) -> Tensor:
    """All of `count` rows, in order, of which each process has its `World.part`."""
    here = world()
    if here.size == 1:
        return rows
    from torch import distributed

    everything = rows.new_zeros(count, *rows.shape[1:])
    everything[here.part(count)] = rows
    distributed.all_reduce(everything)
    return everything


def parallel(model: nn.Module) -> nn.Module:
    """`model` as the first process has it, whose backward pass averages the gradients of all; to be called, not saved.

    The parameters are those of `model` itself, which keeps its names.
    """
    if world().size == 1:
        return model
    import torch
    from torch.nn.parallel import DistributedDataParallel

    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The buffers are equal already; torch before 2.13 knows the option by its other name.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **cast("Any", {buffers: False}))


def equalise(model: nn.Module) -> None:
    """Gives `model` the weights that it has in the first process."""
    if world().size == 1:
        return
    from torch import distributed

    for tensor in model.state_dict().values():
        distributed.broadcast(tensor, src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Makes the gradients of `parameters` the means over all processes, in one message.

    It is for what `parallel` cannot take: parts of a network, and backward passes through a gradient.
    """
    size = world().size
    if size == 1:
        return
    import torch
    from torch import distributed

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, mean in zip(
        gradients, torch.split(flat.div_(size), [each.numel() for each in gradients]), strict=True
    ):
        gradient.copy_(mean.view(gradient.shape))


def in_step(events: Events, asked: Stop, stop: Stop) -> Events:
    """The events; `stop` is told what any process was `asked`, by all at the same event.

    The answer to the question of one event is there at the next: it travels while the loop computes.
    """
    import torch
    from torch import distributed

    question: tuple[Any, Tensor] | None = None
    for event in events:
        if question:
            answer, number = question
            answer.wait()
            stop.number = int(number)
        number = torch.tensor(asked.number)
        question = distributed.all_reduce(number, distributed.ReduceOp.MAX, async_op=True), number
        yield event
