"""How many rows can be decoded together: free memory, divided by what the cache takes for a row."""

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
    model, tokenizer, problems: list[Problem], sampling: Sampling
) -> tuple[int, str]:
    """(rows to decode together, why). There are at most `sampling.slots`, and at full length their
    cache takes at most MEMORY_SHARE of the free memory. One row is always allowed."""
    lengths = [len(student_prompt(tokenizer, p, sampling)) for p in problems]
    columns = max(lengths, default=0) + sampling.max_new_tokens
    column, states = rollout.row_size(model)
    row = columns * column + states  # bytes
    fitting = sampling.slots
    free = free_memory(model.device)
    if free is not None:
        fitting = max(1, min(fitting, int(MEMORY_SHARE * free / row)))
    return fitting, (
        f"the cache of {sampling.slots} rows of {columns} tokens takes up to "
        f"{sampling.slots * row / 2**30:.1f} GiB: {fitting} rows are decoded together"
    )


def free_memory(device: torch.device) -> int | None:
    """In bytes, for this process; None if the system does not say."""
    with suppress(AssertionError, AttributeError, OSError, RuntimeError):
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return torch.cuda.mem_get_info(device)[0] + unused
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                # in KiB; the processes share it
                return 1024 * int(line.split()[1]) // environment_number("LOCAL_WORLD_SIZE", 1)
    return None
