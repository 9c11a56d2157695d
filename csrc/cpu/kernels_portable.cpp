#define RESONA_ISA portable
#include "cpu/micro/kernel_set.inc"
