"""Benchmarks of resona_ext. `python -m benchmarks.kernels --help` is the place to begin."""
