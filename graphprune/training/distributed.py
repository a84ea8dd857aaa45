"""The processes that train together, through accelerate: one, or as many as were launched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError

T = TypeVar("T")

_EMPTY = "the training data yield no batch; pass batches that can be read again every epoch"


@final
class Workers:
    """This process among those that `torchrun` or `accelerate launch` started; alone without them.

    Every process holds the same weights. Each reads its own batches, gradients are
    summed, and so every process takes the same step.
    """

    def __init__(self, device: str | None = None) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as e:
            raise TrainingError(
                "training runs on accelerate, which is not installed: pip install "
                "'graphprune[train]'"
            ) from e
        default = "cuda" if torch.cuda.is_available() else "cpu"
        on_cpu = torch.device(device or default).type == "cpu"
        try:
            self._accelerator = Accelerator(cpu=on_cpu)
        except ValueError as e:
            raise TrainingError(f"accelerate cannot begin: {e}") from e
        if self._accelerator.mixed_precision not in ("no", "bf16"):
            raise TrainingError(
                f"mixed precision {self._accelerator.mixed_precision!r} needs scaled gradients, "
                "which this loop does not have; launch with --mixed_precision bf16 or no"
            )

    @property
    def count(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self._accelerator.process_index)

    @property
    def device(self) -> torch.device:
        return torch.device(self._accelerator.device)

    @property
    def is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision, where `accelerate launch` asks for it."""
        return self._accelerator.autocast()

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        self._accelerator.backward(loss, retain_graph=retain_graph)

    def wait(self) -> None:
        """Block until all processes are here."""
        self._accelerator.wait_for_everyone()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum over processes, bit for bit the same in each."""
        if self.count == 1:
            return values
        result: Tensor = self._accelerator.reduce(values, reduction="sum")
        return result

    def share_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Sum gradients over processes; a parameter without one in every process keeps none."""
        if self.count == 1:
            return
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters.values():
            by_type.setdefault(parameter.dtype, []).append(parameter)
        for dtype, members in by_type.items():
            had = torch.tensor([p.grad is not None for p in members], device=self.device).to(dtype)
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            flat = self.all_reduce(torch.cat([had, *(g.reshape(-1) for g in parts)]))
            counts, rest = flat[: len(members)], flat[len(members) :]
            sizes = [p.numel() for p in members]
            for parameter, piece, count in zip(
                members, torch.split(rest, sizes), counts, strict=True
            ):
                parameter.grad = piece.reshape(parameter.shape) if count else None

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of every process with those of the first."""
        if self.count > 1:
            from accelerate.utils import broadcast

            with torch.no_grad():
                for tensor in tensors:
                    tensor.copy_(broadcast(tensor.detach().contiguous().clone()))

    def run_on_main(self, compute: Callable[[], T]) -> T:
        """Run `compute` in the first process; all return its result, or raise its exception."""
        if self.count == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message = [compute(), None]
            except Exception as e:
                message = [None, e]
        broadcast_object_list(message)
        if message[1] is not None:
            raise message[1]
        value: T = message[0]
        return value


@final
class Feed:
    """Batches in rounds: one for each process. Every process reads all and takes its own.

    What torch draws while batches are read (a DataLoader's shuffling) comes from the seed and the
    epoch alone: the same in all processes, and again when training is resumed in the middle.
    """

    def __init__(self, data: Iterable[Any], seed: int, workers: Workers) -> None:
        self.data, self.seed, self.workers = data, seed, workers
        self.batches = self._count()

    @property
    def rounds_an_epoch(self) -> int:
        return -(-self.batches // self.workers.count)

    def rounds(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Any]]:
        """(number of the batch, batch) of each round after `skip`; batch None where there is none.

        A last round may have batches for some processes only; all of them go through it.

        Raises:
            TrainingError: there are fewer batches than the data said, or gave before.
        """
        source = self._batches(epoch)
        for index in range(self.rounds_an_epoch):
            mine, start = None, index * self.workers.count
            for number in range(start, min(start + self.workers.count, self.batches)):
                batch = next(source, None)
                if batch is None:
                    raise TrainingError(
                        f"the training data end after {number} of {self.batches} batches in epoch "
                        f"{epoch + 1}: give what can be read again every epoch (a list, a "
                        "DataLoader, a class whose __iter__ starts again)"
                    )
                if number - start == self.workers.rank:
                    mine = batch
            if index >= skip:
                yield index * self.workers.count + self.workers.rank, mine

    def first(self) -> Any:
        """The first batch of the first epoch.

        Raises:
            TrainingError: there is none.
        """
        for batch in self._batches(0):
            return batch
        raise TrainingError(_EMPTY)

    def _batches(self, epoch: int) -> Iterator[Any]:
        seed = seed_from(self.seed, "data", epoch)
        batches = getattr(self.data, "batch_sampler", None)
        samplers = (getattr(self.data, "sampler", None), getattr(batches, "sampler", None))
        for owner in (self.data, batches, *samplers):
            own = getattr(owner, "generator", None)
            if isinstance(own, torch.Generator):
                # Left as the last run left it, it would give this run another order.
                own.manual_seed(seed)
        state = torch.Generator().manual_seed(seed).get_state()
        with _drawing(state):
            source = iter(self.data)
        while True:
            with _drawing(state):
                try:
                    batch = next(source)
                except StopIteration:
                    return
            yield batch

    def _count(self) -> int:
        try:
            count = len(self.data)  # type: ignore[arg-type]
        except TypeError:
            count = sum(1 for _ in self._batches(0))
        if not count:
            raise TrainingError(_EMPTY)
        return count


@contextmanager
def _drawing(state: Tensor) -> Iterator[None]:
    """Let torch draw from a state of its own, which goes on where it stopped."""
    held = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        state.copy_(torch.get_rng_state())
        torch.set_rng_state(held)


def seed_from(*parts: object) -> int:
    """A seed for one purpose, from what it is for."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
