"""What bounds the memory of a training on the CPU.

Pieces of a batch that dense.py computes at once; and the C library gives large pieces of memory
back as soon as they are free.

glibc keeps freed tensors below 32 MiB in its heap, between others that are still in use: a
training on the CPU then holds much more than it uses. Reads and writes nothing.
"""

from __future__ import annotations

import ctypes
import gc
import sys

# A part of a batch has so many tokens at most, unless one conversation is longer: what the forward
# pass keeps is bounded, and matrix products of so many rows are as fast as any (0.7 MB a token in
# the 135 M model; a batch of 16 replayed chats has 2,400 tokens).
TOKENS_AT_ONCE = 1024
# Rows of the vocabulary's scores at once: 128 × 49,152 float32 are 25 MB, whatever the batch.
SCORED_AT_ONCE = 128

# Below this size a model's waste is small, and mapping each tensor again costs more time:
# half as much again at 33 M weights, a ninth at 277 M (with a fifth of the memory saved).
WORTH_IT = 200_000_000
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_SIZE = 2**20


def wastes_heap(parameters: int) -> bool:
    """Whether a model of this many weights is left to the C library's own way, heap and all."""
    has_mallopt = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
    return parameters < WORTH_IT or not has_mallopt


def give_back_at_once(parameters: int) -> bool:
    """Map every piece of 1 MiB and more on its own from now on, where that is worth it."""
    if wastes_heap(parameters):
        return False
    return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _SIZE))


def release() -> None:
    """Give the heap's free pages back to the system: between stages, each of which loads a model.

    Without it a process that trains, measures and converts the 135 M model kept 5.0 GB at its end.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Give back the pages between pieces in use: the heap of a long training only grows.

    The 135 M model's grew from 2.3 to 4.2 GB in 110 steps. A call takes milliseconds, and the pages
    have to be mapped again, so it is made every few steps.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
