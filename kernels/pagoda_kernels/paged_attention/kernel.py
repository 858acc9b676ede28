"""paged_attention in the Triton language: decodes and prefill chunks have kernels of their own.

Both hold a block of queries in registers and walk over tiles of keys and values with a running maximum and sum:
see tile.py. decode.py, prefill.py. Decodes wait for memory and chunks for the matrix units, so, where they can, they
run side by side: the chunks on most multiprocessors, the decodes on the others.
"""

from torch import Tensor

from .batch import AttentionBatch
from .call import Call
from .decode import launch_decodes, prepare_decodes
from .prefill import attend_chunks, leaves_room


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """See PagedAttention. Raises ValueError for a scale that is not positive."""
    call = Call.of(q, k_cache, v_cache, batch, scale, window, softcap, k_scale, v_scale)
    has_chunks = batch.num_requests > batch.num_decodes
    decodes = prepare_decodes(call) if batch.num_decodes > 0 else None
    if decodes and has_chunks and not decodes.prefix.parts and leaves_room(call):
        attend_chunks(call, beside_decodes=True)
        launch_decodes(decodes, beside_chunks=True)
        return call.out
    if decodes:
        launch_decodes(decodes)
    if has_chunks:
        attend_chunks(call)
    return call.out
