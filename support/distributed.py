"""The processes of a run and their threads: torch.distributed under torchrun, a group of one without it; nccl between
GPUs, gloo between CPUs. Every method is a collective: all ranks call it, in the same order."""

import gc
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

SMALL_MODEL = 10_000_000  # parameters, up to which a second thread on the CPU costs more than it saves
DEFAULT_THREADS = torch.get_num_threads()


def choose_threads(parameters: int) -> None:
    """On the CPU: one thread for a small model, torch's own choice for others; OMP_NUM_THREADS wins over both. Threads
    wait for each other after every operation: with small matrices, or beside a busy process, longer than they work."""
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it when it starts several processes
        torch.set_num_threads(1 if parameters < SMALL_MODEL else DEFAULT_THREADS)


class Ranks:
    """This process among all of them, and its device."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.distributed = "RANK" in os.environ
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:  # hours: ranks wait for each other's longest completion
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=4))

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
        """Tensors of one shape [...], one from each rank -> [world, ...] on every rank, on the CPU."""
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
        """This rank's part of range(count): contiguous, in the order of ranks, sizes differing by at most one."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def barrier(self) -> None:
        self.max(0)

    def once_per_node(self, make: Callable):
        """make() on one process of every node, then on the others, who find what the first one made."""
        result = make() if self.local_rank == 0 else None
        self.barrier()
        return result if self.local_rank == 0 else make()


def close() -> None:
    """Leave the group, if there is one. What still refers to it goes first (DistributedDataParallel sits in reference
    cycles): gloo's threads would otherwise outlive the interpreter, and abort the process at its very end."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
