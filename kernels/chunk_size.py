"""What every implementation of the delta rules, and whoever counts their work, agrees on."""

from __future__ import annotations

#: Tokens of a chunk (``kChunk`` of native/delta_params.h). For torch on CPU 32 is as fast, 64 keeps half the states.
CHUNK = 64
