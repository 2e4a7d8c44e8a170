"""Checksums of bytes: CRC32C finds damage, SHA-256 gives identity."""

from __future__ import annotations

import hashlib
import os
from mmap import mmap
from typing import Any

import google_crc32c
import numpy as np


def crc32c(data: bytes | bytearray | memoryview | mmap | np.ndarray[Any, Any], start: int = 0) -> int:
    """CRC-32C (Castagnoli; RFC 3720, appendix B.4) of a buffer's bytes, without a copy; ValueError if it has gaps.

    `start` is the checksum of what came before: ``crc32c(b, crc32c(a)) == crc32c(a + b)``.
    Without its compiled back end google_crc32c says so when it is imported, and is some hundred times slower.
    """
    return google_crc32c.extend(start, np.frombuffer(data, np.uint8))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
