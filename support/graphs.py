"""Decoding with CUDA graphs: the step of rollout.Decoder is recorded once per shape, and replayed.

A decode step of a model of 36 layers is thousands of small kernels. If the CPU launches them one by
one, this takes longer than the GPU needs to run them. A CUDA graph launches all of them at once. It
is a recording of kernels with fixed shapes and fixed addresses in memory. So three things must not
change between recording and replay:

    shapes      rows and columns are rounded up to buckets, which lie about a quarter apart
    addresses   the memory of all slots is taken once, at its full size, and serves many calls of rollout.sample
    decisions   what Python decided while recording (how to draw, adapters on or off, autocast) stays as it was: if any
                of it changes, everything is made anew

No GPU has run this yet. What a recording needs is tested on the CPU, with torch.fx instead of CUDA
(tests/test_graphs.py).
"""

import torch

import lora
import rollout
from support.errors import InputError

MOST_GRAPHS = 32  # recordings kept; beyond that, the one that was used longest ago is dropped


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
    """A Decoder whose steps are recorded, each shape at its second use. The first use warms up what
    CUDA needs."""

    def __init__(self, *arguments, **how):
        super().__init__(*arguments, **how)
        # (rows, width) -> replay, or None before the second use; the last one used is the last
        self.recordings = {}
        self.pool = None  # memory that all graphs share: no two of them run at the same time

    def run(self, rows, columns):
        self.cache.reserve(self.columns)
        width = min(bucket(columns, rollout.COLUMNS), self.columns)
        shape = min(bucket(rows, 1), self.slots), width
        replay = None
        if shape not in self.recordings:
            self.warm_up(*shape)
        else:
            replay = self.recordings.pop(shape) or self.record(*shape)
            replay()
        self.recordings[shape] = replay  # behind all others
        if len(self.recordings) > MOST_GRAPHS:
            del self.recordings[next(iter(self.recordings))]  # the first one

    def warm_up(self, rows, width):
        """A step as it is, on a stream of its own, as CUDA wants it before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(rows, width)
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, rows, width):
        """A function that does what `step` does with these numbers."""
        graph = torch.cuda.CUDAGraph()
        # nccl has threads of its own
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.step(rows, width)
        self.pool = graph.pool()
        return graph.replay


class Graphs:
    """A `make_decoder` for rollout.sample, to be kept: it returns the same decoder as long as its
    recordings hold. It serves one call at a time."""

    kind = RecordedDecoder

    def __init__(self):
        self.decoder = None
        self.recorded_for = None

    def __call__(self, model, slots, columns, max_new_tokens, stop_ids, **how) -> rollout.Decoder:
        stop_ids = sorted(stop_ids)
        device = model.device.type
        weights = [*model.parameters(), *model.buffers()]
        enabled = []
        for layer in model.modules():
            if isinstance(layer, lora.LoRALinear):
                enabled.append(layer.enabled)
                weights += layer.copies or []
        # all that a recording depends on
        wanted = (
            model,
            slots,
            max_new_tokens,
            stop_ids,
            how,
            enabled,
            [(tensor.data_ptr(), tensor.dtype) for tensor in weights],
            model.config._attn_implementation,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )
        if wanted != self.recorded_for or columns > self.decoder.columns:
            columns = -(-columns // rollout.COLUMNS) * rollout.COLUMNS  # rounded up
            self.decoder = None  # the old memory is freed before the new one is taken
            self.recorded_for = None  # in case that fails
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
