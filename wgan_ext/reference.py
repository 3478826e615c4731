"""The specification, in plain torch: slow, obvious, differentiable by autograd to any order.

Tests and benchmarks call it; the library never does.
"""

from __future__ import annotations

# critic

# spectral

# sinkhorn
