"""paged_attention for prefill chunks on Hopper GPUs, in Gluon, where a program says which of its warps does what.

One warp has the Tensor Memory Accelerator bring blocks of the cache; two warpgroups multiply, 64 rows each. While a
tile's weights are computed, the matrix units add the values of the one before, or work for the other warpgroup (Shah et
al. 2024, arXiv:2407.08608). Tiles are walked backwards: those with a mask come first. A program takes one item after
the other, a span of queries and a KV head, and the next one's keys are on their way before it has ended.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

if hasattr(tma, "async_load"):
    _bring_piece, _copy = tma.async_load, async_copy.async_load
else:  # as Triton 3.6 names them
    _bring_piece, _copy = tma.async_copy_global_to_shared, async_copy.async_copy_global_to_shared


@builtin
def _view(tiles, shape, _semantic=None):
    """The same shared memory in another shape; a method of Triton's that 3.6 and 3.9 name differently."""
    lengths = [getattr(length, "value", length) for length in shape]
    return _semantic.memdesc_reinterpret(tiles, tiles.dtype, lengths, tiles.layout)


@gluon.jit
def _item(turn, programs):
    """A program's item of a turn; every other turn is dealt from the other side, so that all have about as much."""
    program = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def _span(spans_ptr, item, items, NUM_KV_HEADS: gl.constexpr, FIELDS: gl.constexpr):
    """An item's first token, queries, positions before them, context, chunk; without queries there is none."""
    span_ptr, there = spans_ptr + (1 + item // NUM_KV_HEADS) * FIELDS, item < items
    token = gl.load(span_ptr, there, other=0)
    length = gl.load(span_ptr + 1, there, other=0)
    before = gl.load(span_ptr + 2, there, other=0)
    context = gl.load(span_ptr + 3, there, other=0)
    chunk = gl.load(span_ptr + 4, there, other=0)
    return token, length, before, context, chunk


@gluon.jit
def _tiles(before, length, window, WINDOW: gl.constexpr, POSITIONS: gl.constexpr):
    """The last tile that a span sees, and how many. From the last one on, all but [unmasked, masked) have a mask."""
    end = before + length
    last = (end - 1) // POSITIONS
    count = last + 1
    unmasked = gl.minimum(gl.maximum(count - (before + 1) // POSITIONS, 1), count)
    masked = count
    if WINDOW:
        count -= gl.maximum(before - window + 1, 0) // POSITIONS
        unmasked = gl.minimum(unmasked, count)
        seen_by_all = (gl.maximum(end - window, 0) + POSITIONS - 1) // POSITIONS
        masked = gl.minimum(gl.maximum(last + 1 - seen_by_all, unmasked), count)
    return last, count, unmasked, masked


@gluon.jit
def _ring(source, STAGES: gl.constexpr, POSITIONS: gl.constexpr, HEAD_SIZE: gl.constexpr):
    """Shared memory for tiles of `source`, the same in pieces, and barriers: a stage is ready, it is free."""
    PIECE: gl.constexpr = source.block_shape[0]
    COLUMNS: gl.constexpr = source.block_shape[1]
    PIECES: gl.constexpr = STAGES * POSITIONS * HEAD_SIZE // (PIECE * COLUMNS)
    tiles = gl.allocate_shared_memory(source.dtype, [STAGES, POSITIONS, HEAD_SIZE], source.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    return tiles, _view(tiles, [PIECES, PIECE, COLUMNS]), ready, free


@gluon.jit
def _bring_tile(source, ring, rows, column, stage, phase):
    """Bring a tile, of which each piece begins in one of `rows`, when there is room."""
    tiles, pieces, ready, free = ring
    COLUMNS: gl.constexpr = pieces.shape[2]
    PARTS: gl.constexpr = tiles.shape[2] // COLUMNS
    COUNT: gl.constexpr = tiles.shape[1] // pieces.shape[1]
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), tiles.shape[1] * tiles.shape[2] * 2)
    for part in gl.static_range(PARTS):
        for i in gl.static_range(COUNT):
            place = pieces.index((stage * PARTS + part) * COUNT + i)
            _bring_piece(source, [rows[i], column + part * COLUMNS], ready.index(stage), place)


@gluon.jit
def _bring_all(
    keys, values, spans_ptr, tables_ptr, k_ring, v_ring, table_stride, window, nowhere,
    NUM_KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, WINDOW: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """Bring the tiles of all items. What no query may see comes from nowhere, as zeros."""
    STAGES: gl.constexpr = k_ring[0].shape[0]
    POSITIONS: gl.constexpr = k_ring[0].shape[1]
    HEAD_SIZE: gl.constexpr = k_ring[0].shape[2]
    PIECE: gl.constexpr = k_ring[1].shape[1]
    items, programs = gl.load(spans_ptr) * NUM_KV_HEADS, gl.load(spans_ptr + 1)
    done = 0
    _, next_length, next_before, _, next_chunk = _span(spans_ptr, _item(0, programs), items, NUM_KV_HEADS, FIELDS)
    for turn in range(gl.cdiv(items, programs)):
        length, before, chunk = next_length, next_before, next_chunk
        _, next_length, next_before, _, next_chunk = _span(
            spans_ptr, _item(turn + 1, programs), items, NUM_KV_HEADS, FIELDS
        )
        if length > 0:
            column = _item(turn, programs) % NUM_KV_HEADS * HEAD_SIZE
            table_ptr = tables_ptr + chunk.to(gl.int64) * table_stride
            last, count, _, _ = _tiles(before, length, window, WINDOW, POSITIONS)
            first = 0
            if WINDOW:
                first = gl.maximum(before - window + 1, 0)
            for i in range(count):
                rows = ()
                for piece in gl.static_range(POSITIONS // PIECE):
                    position = (last - i) * POSITIONS + piece * PIECE
                    live = (position < before + length) & (position + PIECE > first)
                    block = gl.load(table_ptr + position // BLOCK_SIZE, live, other=0)
                    rows = rows + (gl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, nowhere),)  # noqa: RUF005
                stage, phase = (done + i) % STAGES, ((done + i) // STAGES) & 1
                _bring_tile(keys, k_ring, rows, column, stage, phase)
                _bring_tile(values, v_ring, rows, column, stage, phase)
            done += count


@gluon.jit
def _weigh(
    scores, peak, start, own, window, scale, softcap,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, POSITIONS: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """A tile's weights, what earlier ones shrink by, the new maximum: tile.py's weigh for scores at hand."""
    if SOFTCAP:
        scores = softcap - 2 * softcap / (1 + gl.exp(2 * (scores * scale / softcap)))
        scale = 1.0
    if MASKED:
        position = start + gl.arange(0, POSITIONS, layout=gl.SliceLayout(0, SCORES))
        visible = position[None, :] <= own[:, None]
        if WINDOW:
            visible &= position[None, :] > (own - window)[:, None]
        scores = gl.where(visible, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    base = new_peak
    if MASKED:
        base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    return gl.exp2(scores * scale - base[:, None]), gl.exp2(peak - base), new_peak


@gluon.jit
def _walk(
    total, weights, shrink, peak, weight_sum, q, k_ring, v_ring, own, done, begin, stop, last, window, scale, softcap,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Weigh the tiles [begin, stop) from the last one on, and add the values of the one before each."""
    k_tiles, _, k_ready, k_free = k_ring
    v_tiles, _, v_ready, v_free = v_ring
    ROWS: gl.constexpr = q.shape[0]
    POSITIONS: gl.constexpr = k_tiles.shape[1]
    nothing = gl.zeros((ROWS, POSITIONS), gl.float32, layout=SCORES)
    for i in range(begin, stop):
        stage, phase = (done + i) % STAGES, ((done + i) // STAGES) & 1
        earlier, earlier_phase = (done + i - 1) % STAGES, ((done + i - 1) // STAGES) & 1
        mbarrier.wait(k_ready.index(stage), phase)
        product = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None]
        mbarrier.wait(v_ready.index(earlier), earlier_phase)
        sums = warpgroup_mma(weights, v_tiles.index(earlier), total, is_async=True)
        scores = warpgroup_mma_wait(1, [product])
        mbarrier.arrive(k_free.index(stage))
        new_weights, shrink, peak = _weigh(
            scores, peak, (last - i) * POSITIONS, own, window, scale, softcap, SOFTCAP, WINDOW, POSITIONS, MASKED,
            SCORES,
        )  # fmt: skip
        weight_sum = weight_sum * shrink + gl.sum(new_weights, 1)
        # So far the sums were under way. Triton would wait for them earlier if the wait did not ask for the weights;
        # ptxas would without a branch before it, which this barrier is: it is open.
        mbarrier.wait(v_ready.index(earlier), earlier_phase)
        total, new_weights = warpgroup_mma_wait(0, [sums, new_weights])
        mbarrier.arrive(v_free.index(earlier))
        weights = gl.convert_layout(new_weights.to(k_tiles.dtype), WEIGHTS)
    return total, weights, shrink, peak, weight_sum


@gluon.jit
def _offsets(
    length, head, token_stride, head_stride, kv_head_stride,
    HALF: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, ROWS: gl.constexpr, PLAIN: gl.constexpr,
):  # fmt: skip
    """Where a warpgroup's rows are from a span's first token on, and which there are: [ROWS, HEAD_SIZE], [ROWS, 1]."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, PLAIN))
    dimension = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, PLAIN))
    query = HALF * (ROWS // GROUP) + row // GROUP
    offset = query * token_stride + row % GROUP * head_stride + head * kv_head_stride
    real = (row < ROWS // GROUP * GROUP) & (query < length)
    return offset[:, None] + dimension[None, :], real[:, None]


@gluon.jit
def _fetch(
    q, q_ptr, token, length, head, q_token, q_head, HALF: gl.constexpr, GROUP: gl.constexpr, PLAIN: gl.constexpr
):  # fmt: skip
    """Have a warpgroup's queries of an item copied; without an item, nothing is."""
    ROWS: gl.constexpr = q.shape[0]
    HEAD_SIZE: gl.constexpr = q.shape[1]
    offset, real = _offsets(length, head, q_token, q_head, GROUP * q_head, HALF, GROUP, HEAD_SIZE, ROWS, PLAIN)
    _copy(q, q_ptr + token.to(gl.int64) * q_token + offset, real)
    async_copy.commit_group()


@gluon.jit
def _clear(v_ring, stage, start, partial, context):
    """Zeros instead of the values behind a context, in the piece that it ends in, of a tile that begins at `start`."""
    tiles, pieces, _, _ = v_ring
    POSITIONS: gl.constexpr = tiles.shape[1]
    PIECE: gl.constexpr = pieces.shape[1]
    PARTS: gl.constexpr = tiles.shape[2] // pieces.shape[2]
    HELD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    position = partial + gl.arange(0, PIECE, layout=gl.SliceLayout(1, HELD))
    for part in gl.static_range(PARTS):
        first = (stage * PARTS + part) * (POSITIONS // PIECE)
        piece = pieces.index(first + (partial - start) // PIECE)
        piece.store(gl.where((position < context)[:, None], piece.load(HELD), 0.0))
    fence_async_shared()


@gluon.jit
def _attend(
    q_ptr, out_ptr, spans_ptr, both_q, k_ring, v_ring, q_token, q_head, window, scale, softcap, v_scale,
    HALF: gl.constexpr, GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr, SOFTCAP: gl.constexpr, WINDOW: gl.constexpr,
    FIELDS: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of each item."""
    q = both_q.index(HALF)
    k_tiles, _, k_ready, k_free = k_ring
    v_tiles, v_pieces, v_ready, v_free = v_ring
    dtype: gl.constexpr = k_tiles.dtype
    STAGES: gl.constexpr = k_tiles.shape[0]
    POSITIONS: gl.constexpr = k_tiles.shape[1]
    ROWS: gl.constexpr = q.shape[0]
    HEAD_SIZE: gl.constexpr = q.shape[1]
    PIECE: gl.constexpr = v_pieces.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, POSITIONS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [4, 1], [1, 0])
    WIDTH: gl.constexpr = GROUP * HEAD_SIZE

    items, programs = gl.load(spans_ptr) * NUM_KV_HEADS, gl.load(spans_ptr + 1)
    done = 0
    next_token, next_length, next_before, next_context, _ = _span(
        spans_ptr, _item(0, programs), items, NUM_KV_HEADS, FIELDS
    )
    head = _item(0, programs) % NUM_KV_HEADS
    _fetch(q, q_ptr, next_token, next_length, head, q_token, q_head, HALF, GROUP, PLAIN)
    for turn in range(gl.cdiv(items, programs)):
        token, length, before, context = next_token, next_length, next_before, next_context
        next_token, next_length, next_before, next_context, _ = _span(
            spans_ptr, _item(turn + 1, programs), items, NUM_KV_HEADS, FIELDS
        )
        if length > 0:
            last, count, unmasked, masked = _tiles(before, length, window, WINDOW, POSITIONS)
            query = HALF * (ROWS // GROUP) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES)) // GROUP
            own = before + gl.minimum(query, length - 1)
            peak = gl.full((ROWS,), float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
            nothing = gl.zeros((ROWS, POSITIONS), gl.float32, layout=SCORES)
            total = gl.zeros((ROWS, HEAD_SIZE), gl.float32, layout=SUMS)

            stage, phase = done % STAGES, (done // STAGES) & 1
            async_copy.wait_group(0)
            fence_async_shared()
            mbarrier.wait(k_ready.index(stage), phase)
            product = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [product])
            mbarrier.arrive(k_free.index(stage))
            new_weights, shrink, peak = _weigh(
                scores, peak, last * POSITIONS, own, window, scale, softcap, SOFTCAP, WINDOW, POSITIONS, True, SCORES
            )
            weight_sum = gl.sum(new_weights, 1)
            weights = gl.convert_layout(new_weights.to(dtype), WEIGHTS)
            # Slots behind the context may hold NaN, which no weight of zero would hide.
            partial = context // PIECE * PIECE
            if (partial < context) & (partial < before + length):
                mbarrier.wait(v_ready.index(stage), phase)
                _clear(v_ring, stage, last * POSITIONS, partial, context)

            total, weights, shrink, peak, weight_sum = _walk(
                total, weights, shrink, peak, weight_sum, q, k_ring, v_ring, own, done, 1, unmasked, last, window,
                scale, softcap, SOFTCAP, WINDOW, STAGES, SCORES, WEIGHTS, True,
            )  # fmt: skip
            total, weights, shrink, peak, weight_sum = _walk(
                total, weights, shrink, peak, weight_sum, q, k_ring, v_ring, own, done, unmasked, masked, last, window,
                scale, softcap, SOFTCAP, WINDOW, STAGES, SCORES, WEIGHTS, False,
            )  # fmt: skip
            if WINDOW:
                total, weights, shrink, peak, weight_sum = _walk(
                    total, weights, shrink, peak, weight_sum, q, k_ring, v_ring, own, done, masked, count, last, window,
                    scale, softcap, SOFTCAP, WINDOW, STAGES, SCORES, WEIGHTS, True,
                )  # fmt: skip

            next_head = _item(turn + 1, programs) % NUM_KV_HEADS
            _fetch(q, q_ptr, next_token, next_length, next_head, q_token, q_head, HALF, GROUP, PLAIN)
            done += count
            stage, phase = (done - 1) % STAGES, ((done - 1) // STAGES) & 1
            mbarrier.wait(v_ready.index(stage), phase)
            total = total * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
            sums = warpgroup_mma(weights, v_tiles.index(stage), total, is_async=True)
            total = warpgroup_mma_wait(0, [sums])
            mbarrier.arrive(v_free.index(stage))

            out = total * gl.convert_layout(v_scale / weight_sum, gl.SliceLayout(1, SUMS))[:, None]
            head = _item(turn, programs) % NUM_KV_HEADS
            offset, real = _offsets(
                length, head, NUM_KV_HEADS * WIDTH, HEAD_SIZE, WIDTH, HALF, GROUP, HEAD_SIZE, ROWS, PLAIN
            )
            target_ptr = out_ptr + token.to(gl.int64) * (NUM_KV_HEADS * WIDTH)
            gl.store(target_ptr + offset, gl.convert_layout(out.to(dtype), PLAIN), real)


@gluon.jit(do_not_specialize=["tables_ptr", "table_stride", "scale", "softcap", "window", "v_scale", "nowhere"])
def attend_all(
    q_ptr, keys, values, out_ptr, spans_ptr, tables_ptr,
    q_token, q_head, table_stride, scale, softcap, window, v_scale, nowhere,
    GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, ROWS: gl.constexpr, POSITIONS: gl.constexpr, STAGES: gl.constexpr,
    FIELDS: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    if gl.program_id(0) >= gl.load(spans_ptr + 1):
        return
    q = gl.allocate_shared_memory(keys.dtype, [2, ROWS, HEAD_SIZE], keys.layout)
    k_ring = _ring(keys, STAGES, POSITIONS, HEAD_SIZE)
    v_ring = _ring(values, STAGES, POSITIONS, HEAD_SIZE)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (
                q_ptr, out_ptr, spans_ptr, q, k_ring, v_ring, q_token, q_head, window, scale, softcap, v_scale,
                0, GROUP, NUM_KV_HEADS, SOFTCAP, WINDOW, FIELDS,
            )),
            (_attend, (
                q_ptr, out_ptr, spans_ptr, q, k_ring, v_ring, q_token, q_head, window, scale, softcap, v_scale,
                1, GROUP, NUM_KV_HEADS, SOFTCAP, WINDOW, FIELDS,
            )),
            (_bring_all, (
                keys, values, spans_ptr, tables_ptr, k_ring, v_ring, table_stride, window, nowhere,
                NUM_KV_HEADS, BLOCK_SIZE, WINDOW, FIELDS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
