"""How many rows can be decoded together: what the cache takes for each, and what is free."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

import rollout
from support.data import Problem
from support.flags import environment_number
from support.sampling import student_prompt
from support.settings import Sampling

MEMORY_SHARE = 0.9  # of the free memory for the cache; the rest is for prefill and logits


def slots_that_fit(
    model, tokenizer, problems: Sequence[Problem], sampling: Sampling
) -> tuple[int, str]:
    """(rows to decode together, at most `sampling.slots`, why): their cache, at full length, takes
    no more than MEMORY_SHARE of the free memory."""
    longest = max(
        (len(student_prompt(tokenizer, problem, sampling.thinking)) for problem in problems),
        default=0,
    )
    columns, slots = longest + sampling.max_new_tokens, sampling.slots
    free, (column, states) = free_memory(model.device), rollout.row_size(model)
    row = columns * column + states
    fitting = slots if free is None else max(1, min(slots, int(MEMORY_SHARE * free / row)))
    known = "unknown" if free is None else f"{free / 2**30:.1f} GiB"
    return fitting, (
        f"the cache of {slots} rows of {columns:,} tokens takes up to {slots * row / 2**30:.1f} "
        f"GiB, free memory is {known}: {fitting} rows are decoded together"
    )


def free_memory(device: torch.device) -> int | None:
    """In bytes, for this process; None where nobody says."""
    with suppress(AssertionError, AttributeError, OSError, RuntimeError, StopIteration):
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return torch.cuda.mem_get_info(device)[0] + unused
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        # the processes share it
        return 1024 * available // environment_number("LOCAL_WORLD_SIZE", 1)
