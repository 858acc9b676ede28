"""How the draw cuts a vocabulary: see Sample."""

GROUP = 32
"""Neighbours; 128 bytes in float32."""
TILE = 4096
"""Tokens of 128 groups; for a program of 4 warps 32 a thread, in 16-byte loads."""
