#define RESONA_ISA avx2
#include "cpu/micro/kernel_set.inc"
