// The Sinkhorn kernels at level avx2.
#define WGAN_EXT_LEVEL_AVX2
#include "cpu.cpp"
