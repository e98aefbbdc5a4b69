"""Names for the kinds of arrays, a mixer of 64-bit numbers, and quicker memory for many arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_KEPT = (32 << 20) - (64 << 10)  # just below the most that glibc's limits adapt to

# The multipliers of splitmix64 (https://prng.di.unimi.it/splitmix64.c).
_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mixed(values: U64) -> U64:
    """Numbers of which every bit depends on every bit of the given ones (splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * _ODD[0]
    values = (values ^ (values >> np.uint64(27))) * _ODD[1]
    return values ^ (values >> np.uint64(31))


def keep_freed_memory() -> None:
    """Let this process use freed memory again, which else goes back to the system each time.

    Allocating it again, page by page, took a third of the time of a scan. The C library of Linux
    keeps as much as the largest block that it saw freed; this one is never touched. Elsewhere
    nothing happens.
    """
    np.empty(_KEPT, np.uint8)
