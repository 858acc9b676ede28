"""paged_attention for prefill chunks on Hopper GPUs: what the kernel can take, and its launch; see hopper_kernel.py."""

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..devices import is_hopper, multiprocessors
from .call import Call
from .hopper_kernel import attend_all
from .spans import FIELDS, POSITIONS, list_spans

# A warpgroup's rows, and tiles on their way: shared memory holds no more.
_ROWS = 64
_STAGES = 2
# Columns of a piece: 128 bytes, the widest row that shared memory is shuffled by.
_COLUMNS = 64


def fits(call: Call) -> bool:
    """Say whether the kernel knows the device and the shapes; see `reads` for the cache's."""
    q = call.q
    return (
        is_hopper(q.device)
        and q.element_size() == 2
        and call.head_size in (64, 128)
        and call.group <= _ROWS
        and q.stride(0) % 16 == q.stride(1) % 16 == q.data_ptr() % 16 == 0  # all that Triton knows of alignment
    )


def reads(cache: Tensor, q: Tensor) -> bool:
    """Say whether the kernel can read a cache [num_blocks, block_size, Hkv, D] as it is."""
    block_size = cache.shape[1]
    return cache.dtype == q.dtype and block_size >= 8 and block_size & (block_size - 1) == 0


def attend_on_hopper(
    call: Call, k_cache: Tensor, v_cache: Tensor, tables: Tensor, *, beside_decodes: bool = False
) -> None:
    """Write the rows of the output that belong to prefill chunks, whose block tables are given.

    beside_decodes: leave multiprocessors to a kernel that is launched early behind this one.
    """
    block_size = k_cache.shape[1]
    piece = min(block_size, POSITIONS)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * _COLUMNS, element_bitwidth=16, rank=2)
    keys, values = (
        TensorDescriptor.from_tensor(cache.view(-1, call.num_kv_heads * call.head_size), [piece, _COLUMNS], layout)
        for cache in (k_cache, v_cache)
    )
    processors = multiprocessors(call.q.device)
    queries = 2 * (_ROWS // call.group)
    itemsize = call.k_cache.element_size() if beside_decodes else 0
    spans = call.batch.prepare(list_spans, call.q.shape[0], queries, call.num_kv_heads, processors, itemsize)
    attend_all[(processors,)](
        call.q,
        keys,
        values,
        call.out,
        spans,
        tables,
        call.q.stride(0),
        call.q.stride(1),
        tables.stride(0),
        call.scale,
        call.softcap,
        call.window,
        call.v_scale,
        k_cache.shape[0] * block_size,
        GROUP=call.group,
        NUM_KV_HEADS=call.num_kv_heads,
        HEAD_SIZE=call.head_size,
        BLOCK_SIZE=block_size,
        SOFTCAP=call.softcap != 0,
        WINDOW=call.window != 0,
        ROWS=_ROWS,
        POSITIONS=POSITIONS,
        STAGES=_STAGES,
        FIELDS=FIELDS,
        num_warps=4,
    )
