"""Retrieval inside linear recurrent models: chunk search and block-sparse attention in one operator."""

from .cache import ChunkCache
from .functional import (
    RetrieveAttendAux,
    RetrieveResult,
    attend,
    pool_chunks,
    retrieve,
    retrieve_attend,
)
from .layer import Resona
from .version import __version__

__all__ = [
    "ChunkCache",
    "Resona",
    "RetrieveAttendAux",
    "RetrieveResult",
    "__version__",
    "attend",
    "pool_chunks",
    "retrieve",
    "retrieve_attend",
]
