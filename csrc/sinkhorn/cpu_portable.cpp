// The Sinkhorn kernels at level portable.
#define WGAN_EXT_LEVEL_PORTABLE
#include "cpu.cpp"
