"""Types of the compiled extension (csrc/bindings.cpp)."""

# critic

# spectral

# sinkhorn

# build facts
torch_version: tuple[int, int, int]
cuda_architectures: str
simd_level: str
