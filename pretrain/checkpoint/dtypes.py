"""Logical dtypes (what a tensor is) and storage dtypes (what numpy and zarr can name). No torch.

bfloat16 and the 8-bit floats are stored as unsigned integers of their width, bit for bit: zarr 3.1.6 does not open
arrays of ``bfloat16``, so the logical dtype travels as an attribute.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: Logical name (torch's, without the prefix) -> storage name (numpy's and zarr's).
STORAGE: Mapping[str, str] = {
    **{name: name for name in ("bool", "float16", "float32", "float64")},
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
}


def storage_dtype(name: str) -> np.dtype:
    """The numpy dtype, little-endian, that holds the bits of a logical dtype."""
    return np.dtype(STORAGE[name]).newbyteorder("<")
