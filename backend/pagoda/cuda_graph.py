"""Steps as CUDA graphs: one launch for the whole model, where hundreds of launches would leave the GPU waiting.

A graph is a fixed sequence of kernels over fixed addresses, so there is one for each of a few shapes, and a step runs
in the smallest that holds it, padded. What differs between steps is in tensors that a graph reads. All graphs share one
memory pool and one output, since one runs at a time. They are captured when the engine has nothing else to do, or when
one is needed, a mixed step's when it is needed again: a start does not wait for them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pagoda_kernels import AttentionBatch

from pagoda.batch import Batch, Layout, read_pending
from pagoda.graph_shapes import Shape, Shapes
from pagoda.rows import Rows

Forward = Callable[[Batch], torch.Tensor]
"""A batch's hidden states [S, hidden]."""
Array = TypeVar("Array", NDArray[np.int64], torch.Tensor)


class Inputs(NamedTuple, Generic[Array]):
    """What travels for a graph, views of one array of int64.

    By token: the decodes, right behind them the chunks, then padding. By request: the decodes, padding, the chunks,
    padding.
    """

    token_ids: Array
    """[rows]; -1: the last sample of its request."""
    positions: Array
    slots: Array
    places: Array
    """[requests], rows in `Rows`."""
    contexts: Array
    """[requests], tokens in the cache; 0 for padding beside chunks, whose tokens may be where its own would be."""
    starts: Array
    """[chunks + 1], the chunks' first tokens and the last one's end; [1] without chunks."""
    prefix: Array
    """[1], tokens that the decodes have in common."""
    sample_rows: Array
    """[requests], of which S count, as in `Layout`. With chunks, what comes out is theirs."""
    sampled: Array
    """[requests], of which S count, as in `Layout`: read not by the graph but by what follows it."""


def views(array: Array, shape: Shape) -> Inputs[Array]:
    sizes = _sizes(shape)
    return Inputs(*(array[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)))


def _sizes(shape: Shape) -> list[int]:
    rows, requests = shape.rows, shape.requests
    return [rows, rows, rows, requests, requests, shape.chunks + 1, 1, requests, requests]


class StepGraph:
    """One captured step."""

    def __init__(self, shape: Shape, rows: Rows, block_size: int, device: torch.device) -> None:
        self.shape = shape
        self._graph = torch.cuda.CUDAGraph()
        self._rows = rows
        self._array = torch.from_numpy(padding(shape, rows.spare)).to(device)
        self._inputs = views(self._array, shape)
        self._make = batch_maker(self._inputs, shape, rows, block_size)

    def call(self, forward: Forward) -> None:
        """Run the step without the graph."""
        forward(self._make())

    def capture(
        self, forward: Forward, output: torch.Tensor, pool: torch.cuda._POOL_HANDLE, stream: torch.cuda.Stream
    ) -> None:
        """Record forward's kernels, ending with a copy of the hidden states to the first rows of `output`."""
        with torch.cuda.stream(stream), _no_collection():
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output[: self.shape.requests] = forward(self._make())
            finally:
                self._graph.capture_end()

    def run(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch the step; the layout's `sample_rows` and `sampled` on the device, valid until the next one."""
        pinned = torch.from_numpy(pack(layout, self.shape, self._rows.spare)).pin_memory()
        self._array.copy_(pinned, non_blocking=True)
        self._graph.replay()
        count = len(layout.sampled)
        return self._inputs.sample_rows[:count], self._inputs.sampled[:count]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Freeing what CUDA holds, another engine's graphs, say, is an error while one is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class StepGraphs:
    """An engine's graphs. Running out of memory during capture is torch's error."""

    def __init__(
        self, forward: Forward, hidden_size: int, dtype: torch.dtype, shapes: Shapes, rows: Rows, block_size: int
    ) -> None:
        self._forward = forward
        self._shapes = shapes
        self._rows = rows
        self._block_size = block_size
        self._device = rows.last_tokens.device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._smallest_first = shapes.all()[::-1]
        most = max(shape.requests for shape in self._smallest_first)
        self._output = torch.empty(most, hidden_size, dtype=dtype, device=self._device)
        self._graphs: dict[Shape, StepGraph] = {}
        self._needed: set[Shape] = set()
        """Of mixed steps, before they had a graph."""

    def call(self, shapes: Iterable[Shape]) -> None:
        """Run each shape's operations once, without a graph: for `compiling_ahead`."""
        for shape in shapes:
            StepGraph(shape, self._rows, self._block_size, self._device).call(self._forward)

    def capture(self, shapes: Iterable[Shape]) -> None:
        """Capture a graph for each shape that has none."""
        for shape in shapes:
            if shape not in self._graphs:
                graph = StepGraph(shape, self._rows, self._block_size, self._device)
                graph.capture(self._forward, self._output, self._pool, self._stream)
                self._graphs[shape] = graph

    def capture_another(self) -> bool:
        """Capture one of those that there are not yet, small ones first; False when all are there."""
        missing = next((shape for shape in self._smallest_first if shape not in self._graphs), None)
        if missing is not None:
            self.capture([missing])
        return missing is not None

    def run(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Hidden states of a step, and the layout's `sample_rows` and `sampled` on the device.

        [S, hidden] with chunks, [T, hidden] without. Valid until the next step. None where no graph fits, or where one
        is wanted for the first time that would not pay at once. Another that is missing is captured now, which takes
        the host somewhat longer than a step without it.
        """
        shape = self._shapes.find(layout)
        if shape is None or (shape.chunks and self._is_new(shape)):
            return None
        self.capture([shape])
        sample_rows, sampled = self._graphs[shape].run(layout)
        return self._output[: len(sampled) if shape.chunks else len(layout.token_ids)], sample_rows, sampled

    def _is_new(self, shape: Shape) -> bool:
        """Whether it was never needed before. A burst's first steps have shapes that soon nobody needs."""
        if shape in self._graphs or shape in self._needed:
            return False
        self._needed.add(shape)
        return True


def batch_maker(inputs: Inputs[torch.Tensor], shape: Shape, rows: Rows, block_size: int) -> Callable[[], Batch]:
    """What makes a graph's batch out of its inputs, by operations of the device alone: it is captured, too.

    Attention's launch sizes follow from the host's lengths. They are the largest for the decodes, and the least for the
    chunks, of which only the number of tokens counts.
    """
    width, decodes = -(-shape.bound // block_size), shape.decodes
    pending = min(decodes, shape.rows)
    leading = torch.arange(decodes, dtype=torch.int64, device=inputs.token_ids.device)

    def make() -> Batch:
        token_ids = read_pending(inputs.token_ids[:pending], inputs.places[:pending], rows)
        if pending < shape.rows:
            token_ids = torch.cat([token_ids, inputs.token_ids[pending:]])
        attention = AttentionBatch(
            block_tables=rows.block_tables[:, :width].index_select(0, inputs.places),
            query_starts=torch.cat([leading, inputs.starts]).to(torch.int32),
            context_lens=inputs.contexts.to(torch.int32),
            query_lens_host=[1] * shape.requests,
            context_lens_host=[shape.bound] * shape.requests,
            num_decodes=decodes,
            shared_prefix=inputs.prefix.to(torch.int32) if shape.shares_prefix else None,
            shared_prefix_host=shape.bound - 1 if shape.shares_prefix else 0,
        )
        outputs = inputs.sample_rows if shape.chunks else None
        return Batch(token_ids, inputs.positions, inputs.slots, attention, outputs)

    return make


def pack(layout: Layout, shape: Shape, spare: int) -> NDArray[np.int64]:
    """A layout as a graph's inputs, padded."""
    array = np.zeros(sum(_sizes(shape)), np.int64)
    inputs = views(array, shape)
    _pad(inputs, shape, spare)
    count, decodes, chunks = len(layout.token_ids), layout.num_decodes, len(layout.rows) - layout.num_decodes
    inputs.token_ids[:count] = layout.token_ids
    inputs.positions[:count] = layout.positions
    inputs.slots[:count] = layout.slots
    behind = slice(shape.decodes, shape.decodes + chunks)
    for target, source in ((inputs.places, layout.rows), (inputs.contexts, layout.context_lens)):
        target[:decodes], target[behind] = source[:decodes], source[decodes:]
    if shape.chunks:
        inputs.starts[:] = count
        inputs.starts[: 1 + chunks] = np.cumsum([decodes, *layout.query_lens[decodes:]])
    else:
        inputs.contexts[decodes:] = layout.shared_prefix + 1  # padding has the prefix, too
    inputs.prefix[0] = layout.shared_prefix
    inputs.sample_rows[: len(layout.sampled)] = layout.sample_rows
    inputs.sampled[: len(layout.sampled)] = layout.sampled
    return array


def padding(shape: Shape, spare: int) -> NDArray[np.int64]:
    """Inputs of decodes that write nothing and read a row of nobody's, and of chunks without tokens."""
    array = np.zeros(sum(_sizes(shape)), np.int64)
    _pad(views(array, shape), shape, spare)
    return array


def _pad(inputs: Inputs[NDArray[np.int64]], shape: Shape, spare: int) -> None:
    inputs.slots[:] = -1
    inputs.places[:] = spare
    inputs.contexts[:], inputs.starts[:] = (0, 0) if shape.chunks else (1, shape.decodes)
