"""How many rows can be decoded together: free memory, divided by what the cache takes for a row."""

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
    """(rows to decode together, why). There are at most `sampling.slots`, and at full length their
    cache takes no more than MEMORY_SHARE of the free memory."""
    prompts = [student_prompt(tokenizer, problem, sampling.thinking) for problem in problems]
    columns = max(map(len, prompts), default=0) + sampling.max_new_tokens
    column, states = rollout.row_size(model)
    row = columns * column + states  # bytes
    slots = sampling.slots
    fitting = slots
    free = free_memory(model.device)
    if free is not None:
        fitting = max(1, min(slots, int(MEMORY_SHARE * free / row)))
    return fitting, (
        f"the cache of {slots} rows of {columns:,} tokens takes up to {slots * row / 2**30:.1f} "
        f"GiB: {fitting} rows are decoded together"
    )


def free_memory(device: torch.device) -> int | None:
    """In bytes, for this process; None if the system does not say."""
    with suppress(AssertionError, IndexError, OSError, RuntimeError):
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return torch.cuda.mem_get_info(device)[0] + unused
        text = Path("/proc/meminfo").read_text()
        available = text.split("MemAvailable:")[1].split()[0]  # in KiB
        return 1024 * int(available) // environment_number("LOCAL_WORLD_SIZE", 1)  # of a process
    return None
