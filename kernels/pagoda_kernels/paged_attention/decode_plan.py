"""How the work of decode attention is cut into programs: from shapes and from what the host knows of lengths."""

from dataclasses import dataclass

import triton

from .call import Call, Tiles

# Programs that fill the chip: a few for each of the 132 multiprocessors of an H100 or H200. With fewer, requests are
# cut into parts; with more, only what is so long that it might end alone.
_PROGRAMS = 512
_MAX_SPLITS = 32
_LONG_SPLIT_TOKENS = 2048
_LONG_SPLITS = 8
# Two requests of Llama-3.1-8B: as few programs as this are made small, and of a long context, many.
_FEW = 16
_LONG = 4096
_FEW_LONG_SPLITS = 64


@dataclass(frozen=True)
class Splits:
    """A request is cut into at most `most` parts, and into one for every `tokens` positions at most."""

    most: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """How decodes are launched."""

    tiles: Tiles
    splits: Splits
    ahead: bool
    """Whether a program's first tile is read before the kernel ahead has ended, into registers."""
    added: int
    """Parts that the last program of a request adds at a time; 0: a kernel of its own adds them."""


def plan_splits(num_requests: int, num_kv_heads: int, max_context: int) -> Splits:
    """Choose from what the host knows; max_context may be an upper bound."""
    programs = num_requests * num_kv_heads
    if programs >= _PROGRAMS:
        wanted, tokens = _LONG_SPLITS, _LONG_SPLIT_TOKENS
    elif programs > _FEW:
        wanted, tokens = min(triton.cdiv(_PROGRAMS, programs), _MAX_SPLITS), 64
    else:
        wanted, tokens = _MAX_SPLITS if max_context <= _LONG else _FEW_LONG_SPLITS, 32
    return Splits(min(triton.cdiv(max_context, tokens), wanted), tokens)


def plan_decodes(call: Call, max_context: int, with_prefix: bool) -> Plan:
    """Programs have tiles of keys of 8 to 32 KiB. The matrix units want 16 rows at least.

    max_context counts what each decode reads for itself, which is often little where there is a prefix.
    """
    num_decodes = call.batch.num_decodes
    programs = num_decodes * call.num_kv_heads
    few, small = programs <= _FEW, programs < 2 * _PROGRAMS or with_prefix
    rows = max(16, triton.next_power_of_2(call.group))
    if small:
        # In registers, where 8-bit keys take 16 bits.
        size, itemsize = 8192 if few else 16384, call.q.element_size()
        warps, stages = 2 if rows == 16 else 4, 3
    elif call.k_cache.element_size() == 1:
        # Keys of 8 bits have half the bytes and more instructions each, for which small programs take turns.
        size, itemsize = 8192, 1
        warps, stages = 2 if rows == 16 else 4, 2
    else:
        size, itemsize = 32768, call.k_cache.element_size()
        warps, stages = 4, 2
    positions = max(16, min(128, size // (call.head_padded * itemsize)))
    tiles = Tiles(rows, positions, warps, stages)
    ahead = small and not with_prefix
    splits = plan_splits(num_decodes, call.num_kv_heads, max_context)
    # In registers, of which many programs should not need many.
    outputs = (8192 if few else 4096) // (call.head_padded * triton.next_power_of_2(call.group))
    added = max(1, min(16, outputs))
    # One program that adds more than a few times takes longer than a second kernel.
    return Plan(tiles, splits, ahead, added if splits.most <= min(4 * added, _MAX_SPLITS) else 0)
