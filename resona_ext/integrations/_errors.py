"""The one form of every complaint of this package."""

from __future__ import annotations

from typing import NoReturn


def complain(argument: str, expected: object, got: object, function: str = "augment") -> NoReturn:
    raise ValueError(f"{function}: {argument}: expected {expected}, got {got}")


def require(
    ok: bool, argument: str, expected: object, got: object, function: str = "augment"
) -> None:
    if not ok:
        complain(argument, expected, got, function)
