// What several runners link: plans, and launches that stages share.
#include "common/plan_cuda.cpp"
#include "cuda/index.cu"
#include "cuda/packed.cu"
