"""What the operator costs over ranks: counted in processes, and by a model for more tokens and devices.

    python -m benchmarks.scaling --output benchmarks/results/scaling-cpu

model.py      floating-point operations, bytes and messages, by formula
counting.py   the same, counted: what selections need, and what leaves a process
plot.py       the model from 64K to 100M tokens on 1 to 1,024 devices
"""
