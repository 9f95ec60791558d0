"""The processes of a run and their threads: torch.distributed under torchrun, a group of one
without it; nccl between GPUs, gloo between CPUs. Every method is a collective: all ranks call it,
in the same order."""

import gc
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from support.errors import InputError, LocalError, reason
from support.flags import environment_number

# parameters, up to which a second thread on the CPU costs more than it saves
SMALL_MODEL = 10_000_000
DEFAULT_THREADS = torch.get_num_threads()


def choose_threads(parameters: int) -> None:
    """On the CPU: one thread for a small model, torch's own choice for others; OMP_NUM_THREADS wins
    over both. Threads wait for each other after every operation: with small matrices, or beside a
    busy process, longer than they work."""
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it when it starts several processes
        torch.set_num_threads(1 if parameters < SMALL_MODEL else DEFAULT_THREADS)


class Ranks:
    """This process among all of them, and its device."""

    def __init__(self):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        self.rank, self.world, self.local_rank = map(environment_number, names, (0, 1, 0))
        needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if not os.environ.get(name)]
        self.distributed = "RANK" not in missing
        # such a process would train on a part of each step
        if self.rank >= self.world or missing and (self.distributed or self.world > 1):
            raise LocalError(
                f"the environment has RANK={os.environ.get('RANK', '')} and "
                f"WORLD_SIZE={self.world}{', but no ' if missing else ''}{' or '.join(missing)}: "
                "start with torchrun, which sets what belongs together, or unset RANK and "
                "WORLD_SIZE for one process"
            )
        self.device = (
            torch.device("cuda", self.local_rank)
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                # Attention by flash, memory-efficient or plain math. cuDNN's makes a plan for every
                # new shape, and here every micro-batch is one; gradients that are nan under masks
                # were reported of it, too.
                torch.backends.cuda.enable_cudnn_sdp(False)
            if self.distributed:  # hours: ranks wait for each other's longest completion
                dist.init_process_group(
                    "nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=4)
                )
        # no such GPU, a port in use, an address that is none
        except (RuntimeError, ValueError) as error:
            raise LocalError(
                f"rank {self.rank} cannot join the others ({reason(error)}): check MASTER_ADDR and "
                "MASTER_PORT, and that every process of a node has a GPU of its own"
            ) from None

    @classmethod
    def alone(cls) -> "Ranks":
        """For commands that do not share their work; InputError under a torchrun of several
        processes."""
        ranks = cls()
        if ranks.world > 1:
            raise InputError("this command works in one process: start it without torchrun")
        return ranks

    def sum(self, values: list[float]) -> list[float]:
        """Element by element over all ranks, in float64; the same on every rank."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def _reduce(self, values: list[float], operation) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.distributed:
            dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape [...], one from each rank -> [world, ...] on every rank, on the
        CPU."""
        if not self.distributed:
            return tensor.cpu().unsqueeze(0)
        tensor = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts).cpu()

    def gather_lists(self, items: list) -> list:
        """The lists of all ranks, one after the other, on every rank."""
        if not self.distributed:
            return items
        parts: list = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def share(self, count: int) -> range:
        """This rank's part of range(count): contiguous, in the order of ranks, sizes differing by
        at most one."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def barrier(self) -> None:
        self.max(0)

    def together(self, make: Callable, *arguments):
        """make(*arguments); if it raises InputError on some ranks, all raise that of the first of
        them."""
        result, problems = None, []
        try:
            result = make(*arguments)
        except InputError as error:
            problems = [str(error)]
        for problem in self.gather_lists(problems):
            raise InputError(problem)
        return result

    def once_per_node(self, make: Callable):
        """make() on one process of every node, then on the others, who find what the first one
        made."""
        first = self.together(lambda: make() if self.local_rank == 0 else None)
        return self.together(lambda: first if self.local_rank == 0 else make())


def close() -> None:
    """Leave the group, if there is one. What still refers to it goes first (DistributedDataParallel
    sits in reference cycles): gloo's threads would otherwise outlive the interpreter, and abort the
    process at its very end."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
