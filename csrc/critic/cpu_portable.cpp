#define WGAN_EXT_LEVEL_PORTABLE
#include "cpu.cpp"
