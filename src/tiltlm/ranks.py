"""The processes that work together, as torchrun starts them; each knows its number and how many there are.

    torchrun --nproc-per-node 2 -m tiltlm run TASK/METHOD …

All of them run the same program and come to the same calls here in the same order; rows and results are shared out and
brought together again, so that every process always holds whole batches. What only one may do (write files, ask a judge)
the first does. With one process everything here is the identity and no process group is made.

Tensors that are summed or copied go over NCCL where they lie on a GPU, everything else over gloo. A process that ends
breaks the connections of the others, which end too; torchrun ends those that do not, within half a minute.

torch is imported where several processes need it: the command line asks here who speaks, and does without.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

LOST = timedelta(minutes=10)
"""How long a sum over processes waits for the slowest of them."""

PATIENCE = timedelta(days=30)
"""How long processes wait for what the first one does alone."""

BUCKET = 1 << 24
"""Numbers that are summed in one message."""


# ---- who is there ------------------------------------------------------------------------------------------


class _Solo:
    """How many pieces of work, one inside the other, the first process is doing alone."""

    depth = 0


@cache
def _launched() -> tuple[int, int]:
    """(this process's number, how many there are), as torchrun wrote them into the environment."""
    found = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if None in found or "MASTER_ADDR" not in os.environ:
        return 0, 1
    return int(found[0] or 0), int(found[1] or 1)


def size() -> int:
    """How many processes share the work: 1 too while the first one does something `alone`."""
    return 1 if _Solo.depth else _launched()[1]


def number() -> int:
    """This process's number, from 0."""
    return 0 if _Solo.depth else _launched()[0]


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return _launched()[0] == 0


def local() -> int:
    """This process's number among those of its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _launched()[1] > 1 else 0


def others() -> tuple[int, ...]:
    """What to add to the name of a random stream of which every process needs another one: nothing for the first."""
    return (number(),) if number() else ()


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process is the only one: what would be shared out it does by itself, and waits for nobody."""
    _Solo.depth += 1
    try:
        yield
    finally:
        _Solo.depth -= 1


# ---- shares ------------------------------------------------------------------------------------------------


def share(n: int) -> tuple[int, int]:
    """(begin, end) of this process's part of n rows; parts differ by one row at most, and may be empty."""
    return n * number() // size(), n * (number() + 1) // size()


# ---- what all do together ----------------------------------------------------------------------------------

_BEFORE: list[Callable[[], None]] = []


def before_meetings(act: Callable[[], None]) -> None:
    """Have every process do this whenever it comes to something that all do together."""
    _BEFORE.append(act)


def meet() -> None:
    """What every process does before it waits for the others; nothing where there are none."""
    if size() > 1:
        for act in _BEFORE:
            act()


@cache
def _groups() -> tuple[Any, Any]:
    """torch.distributed and the group for objects, made when they are first needed."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if gpus:
        torch.cuda.set_device(local())
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=LOST)
    return dist, dist.new_group(backend="gloo", timeout=PATIENCE)


def ready() -> Any:
    """The group for objects, for libraries that talk by themselves; they find the one for tensors, which is made too."""
    return _groups()[1]


def leave() -> None:
    """End the group, once everything is done."""
    if _groups.cache_info().currsize:
        _groups()[0].destroy_process_group()
        _groups.cache_clear()


@contextmanager
def connected() -> Iterator[tuple[Any, Any]]:
    """The library and the group for objects; a broken connection is said in one line."""
    try:
        yield _groups()
    except RuntimeError as error:
        if type(error) is not RuntimeError and not type(error).__name__.startswith("Dist"):
            raise  # memory, say
        why = str(error).strip().split("\n")[0].partition(". ")[0]
        raise ConnectionError(
            f"the {size()} processes of this run have lost each other ({why}): another one ended, and says why; "
            "the same command goes on from the last checkpoint"
        ) from error


def gathered(own: Sequence[T]) -> list[T]:
    """Every process's list, one after the other; tensors come back without gradient, on this process's device."""
    if size() == 1:
        return list(own)
    meet()
    found: list[Any] = [None] * size()
    with connected() as (dist, group):
        dist.all_gather_object(found, _packed(list(own)), group=group)
    return [each for part in found for each in pickle.loads(part)]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, `alone`, on every process."""
    if size() == 1:
        return make()
    found = [b""]
    if is_first():
        with alone():
            found = [_packed(make())]
    meet()
    with connected() as (dist, group):
        dist.broadcast_object_list(found, 0, group=group)
    made: T = pickle.loads(found[0])
    return made


def in_shares(n: int, make: Callable[[int, int], Sequence[T]]) -> list[T]:
    """Each process's `make(begin, end)` for its part of n rows, one after the other, on every process.

    A part is made `alone`: work within it is not shared out again. A process without rows makes nothing.
    """
    if size() == 1 or n == 0:
        return list(make(0, n))
    begin, end = share(n)
    with alone():
        own = make(begin, end) if begin < end else ()
    return gathered(own)


def any_of(own: T | None) -> T | None:
    """The first of the processes' values that is not None."""
    return next((each for each in gathered([own]) if each is not None), None)


def wait() -> None:
    """Go on once every process has come here."""
    gathered([None])


def first_then_others(make: Callable[[], T]) -> T:
    """`make()` on every process, on the others when the first has finished: they find the files that it wrote."""
    if size() == 1:
        return make()
    if is_first():
        with alone():
            made = make()
        wait()
        return made
    wait()
    with alone():
        return make()


# ---- parameters --------------------------------------------------------------------------------------------


def same_as_first(parameters: Sequence[Tensor]) -> None:
    """Give all processes the first one's values."""
    if size() > 1:
        meet()
        with connected() as (dist, _):
            for parameter in parameters:
                dist.broadcast(parameter.data, 0)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its sum over the processes; none where no process has one."""
    if size() == 1:
        return
    import torch

    meet()
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    with connected() as (dist, _):
        dist.all_reduce(has)
        used = [p for p, count in zip(parameters, has.tolist(), strict=True) if count]
        for some in _buckets(used):
            flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in some])
            dist.all_reduce(flat)
            for p, whole in zip(some, flat.split([p.numel() for p in some]), strict=True):
                p.grad = whole.view_as(p)


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype side by side, about `BUCKET` numbers at a time."""
    some: list[Tensor] = []
    for p in parameters:
        if some and (some[0].dtype != p.dtype or sum(x.numel() for x in some) + p.numel() > BUCKET):
            yield some
            some = []
        some.append(p)
    if some:
        yield some


# ---- objects on their way ----------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Tensors travel without gradient and over the CPU; those of a GPU come to the GPU of whoever unpacks them."""

    def reducer_override(self, x: Any) -> Any:
        from torch import Tensor

        if not isinstance(x, Tensor):
            return NotImplemented
        if x.device.type == "cpu":
            return _as_tensor, (_bits(x.detach()), x.dtype, tuple(x.shape), "cpu")
        return _as_tensor, (_bits(x.detach().cpu()), x.dtype, tuple(x.shape), x.device.type)


def _bits(x: Tensor) -> Any:
    import torch

    return x.contiguous().reshape(-1).view(torch.uint8).numpy() if x.numel() else None


def _as_tensor(bits: Any, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensor:
    import torch

    if bits is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(bits).view(dtype).reshape(shape).to(device)


def _packed(x: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(x)
    return file.getvalue()
