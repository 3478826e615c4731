"""The memory that the library keeps for results on the CPU."""

from __future__ import annotations

from . import _C

__all__ = ["empty_cache"]


def empty_cache() -> int:
    """Free the memory that is kept for large results on the CPU, and return how many bytes that were.

    Where malloc would give a freed tensor back to the system and take the next one from it, with a page fault for every
    page, spectral normalization and Sinkhorn's matrices of costs keep freed memory for later results, at most as many
    bytes as they once took at a time. Memory of tensors that are in use is not touched. On CUDA torch's allocator
    serves, which has ``torch.cuda.empty_cache``.
    """
    return _C.empty_cache()
