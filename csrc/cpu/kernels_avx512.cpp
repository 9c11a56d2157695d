#define RESONA_ISA avx512
#include "cpu/micro/kernel_set.inc"
