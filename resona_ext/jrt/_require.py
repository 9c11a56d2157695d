"""Errors of this package: which argument, what was expected, what came."""

from __future__ import annotations


def require(ok: bool, argument: str, expected: object, got: object) -> None:
    if not ok:
        raise ValueError(f"resona_ext.jrt: {argument}: expected {expected}, got {got}")
