"""The processes of a run and their threads.

Under torchrun they are a group of torch.distributed: nccl connects GPUs, gloo CPUs. Without it one
process is a group of one.
"""

import gc
import os
from collections.abc import Callable
from datetime import date, timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from support.errors import InputError, LocalError
from support.flags import environment_number

# of fewer parameters: a second thread on the CPU costs more than it saves
SMALL_MODEL = 10_000_000
DEFAULT_THREADS = torch.get_num_threads()


def choose_threads(parameters: int) -> None:
    """On the CPU: one thread for a small model, torch's own choice for others.

    Threads wait for each other after every operation. With small matrices that takes longer than
    the work. OMP_NUM_THREADS wins; torchrun sets it when it starts several processes.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if parameters < SMALL_MODEL else DEFAULT_THREADS)


class Ranks:
    """This process among all of them, and its device.

    Most methods are collectives: all ranks call them, in the same order.
    """

    def __init__(self):
        self.rank = environment_number("RANK", 0)
        self.world = environment_number("WORLD_SIZE", 1)
        self.local_rank = environment_number("LOCAL_RANK", 0)
        needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if not os.environ.get(name)]
        self.distributed = not missing
        # With WORLD_SIZE alone every process would be rank 0, and train on the same part of a step.
        if missing and ("RANK" not in missing or self.world > 1):
            raise LocalError(
                f"RANK or WORLD_SIZE is set, but no {' or '.join(missing)}: start with torchrun, or "
                "unset RANK and WORLD_SIZE"
            )
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
            # cuDNN's attention makes a plan for every new shape, and every micro-batch has a new
            # one. Users also report that it gives gradients of nan when there is a mask.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.distributed:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            # Hours, because ranks wait for each other's longest completion.
            dist.init_process_group(backend, timeout=timedelta(hours=4))

    @classmethod
    def alone(cls) -> "Ranks":
        """For commands that work in one process; InputError if torchrun started several."""
        ranks = cls()
        if ranks.world > 1:
            raise InputError("this command works in one process: start it without torchrun")
        return ranks

    def sum(self, values: list[float]) -> list[float]:
        """Element by element over all ranks, in float64; the same on every rank."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def _reduce(self, values, operation):
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.distributed:
            dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape [...], one from each rank -> [world, ...], on the CPU."""
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
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return sum(parts, [])

    def today(self) -> str:
        """The date where rank 0 is, YYYY-MM-DD."""
        return self.gather_lists([date.today().isoformat()])[0]

    def share(self, count: int) -> range:
        """This rank's part of range(count), in the order of ranks. Sizes differ by at most one."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def barrier(self) -> None:
        self.max(0)

    def together(self, make: Callable, *arguments):
        """make(*arguments). If some ranks raise InputError, all raise the first one."""
        result = None
        problems = []
        try:
            result = make(*arguments)
        except InputError as error:
            problems.append(str(error))
        problems = self.gather_lists(problems)
        if problems:
            raise InputError(problems[0])
        return result

    def on_first(self, make: Callable[[], None]) -> None:
        """make() on rank 0. If it raises InputError, all ranks do."""
        self.together(lambda: make() if self.rank == 0 else None)

    def once_per_node(self, make: Callable):
        """Call make() in one process of every node. Then call it in the others, which may use the
        files that the first call wrote. Returns each process's own result."""
        first = self.together(lambda: make() if self.local_rank == 0 else None)
        return self.together(lambda: first if self.local_rank == 0 else make())


def close() -> None:
    """Leave the group, if there is one.

    Objects that use the group must be deleted before. DistributedDataParallel is in reference
    cycles, so that takes gc.collect(). Otherwise gloo's threads would outlive the interpreter, and
    abort the process at its end.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
