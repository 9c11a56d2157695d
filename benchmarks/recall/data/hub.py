"""Data sets by name, through Hugging Face datasets: "hub:squad:train".

A place is hub:NAME:SPLIT, where NAME is one of KNOWN or owner/name, owner/name/configuration, either with
@revision behind it, and SPLIT is any that datasets understands, as train or validation[:500].
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

PREFIX = "hub:"
KNOWN = {
    "squad": "rajpurkar/squad",
    "coqa": "stanfordnlp/coqa",
    "narrativeqa": "deepmind/narrativeqa",
    "triviaqa": "mandarjoshi/trivia_qa/rc.wikipedia",
    "wikitext-2": "Salesforce/wikitext/wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext/wikitext-103-raw-v1",
}


def is_hub(place: str) -> bool:
    return place.startswith(PREFIX)


def read_rows(place: str) -> Iterable[dict]:
    """The rows of a split. Raises ValueError, one line that says what to do, where they cannot be had."""
    name, configuration, revision, split = _parse(place)
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"{place}: needs the package datasets ({error}): pip install datasets, or download the "
            "files and give their path"
        ) from error
    try:
        return library.load_dataset(name, configuration, split=split, revision=revision)
    except Exception as error:  # of the network, the server, the cache, the name: many kinds
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(
            f"{place}: datasets cannot load {name} ({type(error).__name__}: {reason}); without a "
            "connection download its files elsewhere and give their path"
        ) from error


def _parse(place: str) -> tuple[str, str | None, str | None, str]:
    """-> name, configuration, revision, split."""
    name, colon, split = place.removeprefix(PREFIX).partition(":")
    name, _, revision = name.partition("@")
    owner, *rest = KNOWN.get(name, name).split("/", 2)
    if not (colon and split and owner and rest):
        known = ", ".join(KNOWN)
        raise ValueError(
            f"{place}: expected hub:NAME:SPLIT, where NAME is owner/name or one of {known}"
        )
    configuration = rest[1] if len(rest) > 1 else None
    return f"{owner}/{rest[0]}", configuration, revision or None, split
