"""The operators timed against FlashAttention and the sparse peers: one harness for CPU and GPU.

shapes      what is measured: shapes and suites, as data
data        random inputs, with three patterns of selection
operators   the registry: pool, search, attend, fused, backward, decode, layer
baselines   who else takes part, and why somebody is missing
truth       the check that every contender passes before it is timed
timer       wall clock on a CPU; CUDA events, graph replay and an L2 flush on a GPU
ceilings    what this machine can do at most: copy, gather, matmul
model       bytes and operations by formula, and the floor that follows
runner      the loop; record, table, plots: what becomes of the results
compare     the same suite on two commits
"""
