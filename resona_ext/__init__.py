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
from .integrations import Augmentation, augment, load_resona, save_resona
from .layer import Resona
from .precomputed import PrecomputedRetrieval
from .recall import SearchRecall, search_recall
from .version import __version__

__all__ = [
    "Augmentation",
    "ChunkCache",
    "PrecomputedRetrieval",
    "Resona",
    "RetrieveAttendAux",
    "RetrieveResult",
    "SearchRecall",
    "__version__",
    "attend",
    "augment",
    "load_resona",
    "pool_chunks",
    "retrieve",
    "retrieve_attend",
    "save_resona",
    "search_recall",
]
