// The Sinkhorn kernels at level avx512.
#define WGAN_EXT_LEVEL_AVX512
#include "cpu.cpp"
