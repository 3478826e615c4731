#define WGAN_EXT_LEVEL_AVX512
#include "cpu.cpp"
