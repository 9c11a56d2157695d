"""Wheels for a chosen CUDA version: `python -m tools.wheel --cuda 13.0`. docs/wheels.md tells the story."""
