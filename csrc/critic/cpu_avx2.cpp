#define WGAN_EXT_LEVEL_AVX2
#include "cpu.cpp"
