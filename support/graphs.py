"""Decoding with CUDA graphs: the step of rollout.Decoder is recorded once per shape, and replayed.

A decode step of a model of 36 layers is thousands of small kernels. Launched one by one by the
host, they take longer than the device needs to run them; a CUDA graph launches all of them at once.
What it repeats are addresses and shapes, so these must be few and must stay:

    shapes      rows and columns are rounded up to buckets, which lie about a quarter apart
    addresses   the memory of all slots is taken once, at its full size, and serves many calls of rollout.sample
    decisions   what Python decided while recording (how to draw, adapters on or off, autocast) stays as it was: if any
                of it changes, everything is made anew

No GPU has run this yet. What a recording needs is tested on the CPU, with torch.fx in the place of
CUDA (tests/test_graphs.py).
"""

from collections.abc import Callable, Iterable

import torch

import lora
import rollout
from support.errors import InputError

MOST_GRAPHS = 32  # recordings kept; of more, the one that was not used for the longest time goes


def bucket(n: int, unit: int) -> int:
    """The first of unit, 2 unit, 3 unit, ... that is at least n; above 8 units they lie up to a
    quarter apart.

    >>> [bucket(n, 1) for n in (1, 8, 9, 11, 13)], bucket(290, 32)
    ([1, 8, 10, 12, 15], 320)
    """
    size = unit
    while size < n:
        size += max(1, size // unit // 4) * unit
    return size


class RecordedDecoder(rollout.Decoder):
    """A Decoder whose steps are recorded, each shape at its second use: the first one warms up what
    CUDA needs."""

    def __init__(self, *arguments, **how):
        super().__init__(*arguments, **how)
        # by (rows, width), the latest last
        self.recordings: dict[tuple[int, int], Callable | None] = {}
        self.pool = None  # memory that all graphs share: no two of them run at the same time

    def run(self, rows: int, columns: int) -> None:
        self.cache.reserve(self.columns)
        shape = (
            min(bucket(rows, 1), self.slots),
            min(bucket(columns, rollout.COLUMNS), self.columns),
        )
        replay = None  # of a new shape, which runs as it is and is recorded at its second use
        if shape not in self.recordings:
            self.warm_up(*shape)
        else:
            replay = self.recordings.pop(shape) or self.record(*shape)
            replay()
        self.recordings[shape] = replay  # at the end: the latest
        if len(self.recordings) > MOST_GRAPHS:
            self.recordings.pop(next(iter(self.recordings)))

    def warm_up(self, rows: int, width: int) -> None:
        """A step as it is, on a stream of its own, as CUDA wants it before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(rows, width)
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, rows: int, width: int) -> Callable[[], None]:
        """A function that does what `step` does with these numbers."""
        graph = torch.cuda.CUDAGraph()
        # nccl has threads of its own
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.step(rows, width)
        self.pool = graph.pool()
        return graph.replay


class Graphs:
    """A `make_decoder` for rollout.sample, to be kept: gives the same decoder while its recordings
    hold. It serves one call at a time."""

    kind = RecordedDecoder

    def __init__(self):
        self.decoder, self.recorded_for = None, None

    def __call__(
        self, model, slots: int, columns: int, max_new_tokens: int, stop_ids: Iterable[int], **how
    ) -> rollout.Decoder:
        stop_ids, device = sorted(stop_ids), model.device.type
        adapters = [layer for layer in model.modules() if isinstance(layer, lora.LoRALinear)]
        weights = [
            *model.parameters(),
            *model.buffers(),
            *(copy for layer in adapters for copy in layer.copies or []),
        ]
        wanted = (
            model,
            slots,
            max_new_tokens,
            stop_ids,
            how,
            [layer.enabled for layer in adapters],
            [(tensor.data_ptr(), tensor.dtype) for tensor in weights],
            model.config._attn_implementation,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )
        if wanted != self.recorded_for or columns > self.decoder.columns:
            # if prompts get longer, then with some to spare
            exact = -(-columns // rollout.COLUMNS) * rollout.COLUMNS
            columns = bucket(columns, rollout.COLUMNS) if wanted == self.recorded_for else exact
            # the old memory is free before the new one is taken
            self.decoder = self.recorded_for = None
            self.decoder = self.kind(model, slots, columns, max_new_tokens, stop_ids, **how)
            self.recorded_for = wanted
        for tensor in self.decoder.memory():  # nothing of an earlier call is left, not even nan
            tensor.zero_()
        return self.decoder


def choose(wanted: bool, device: torch.device) -> Graphs | None:
    """What --cuda-graphs means on this device."""
    if wanted and device.type != "cuda":
        raise InputError(
            "--cuda-graphs: torch sees no CUDA GPU here: leave it out, or say --no-cuda-graphs"
        )
    return Graphs() if wanted else None
