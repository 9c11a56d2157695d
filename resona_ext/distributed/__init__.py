"""One sequence over many devices: the operator with tokens sharded along a dimension of a DeviceMesh.

layout.py     which rank holds which tokens, and so which chunks
agreement.py  every rank checks what all ranks were given, so that a mistake is an error on each and no hang
collectives.py  what torch.distributed moves for us
exchange.py   how a query meets a chunk of another rank: the chunk travels, or the query does
plan.py       which of the two moves fewer bytes
attention.py  retrieve_attend
rows.py       rows of other ranks that the layout alone says
layer.py      `Resona.forward` with a mesh
cache.py      ShardedChunkCache: decoding with a context that no device holds alone
whole.py      modules that cannot work on a part of the sequence get the whole
sharding.py   batch and heads of DTensors: rules for every operator, registered on import
"""

from . import sharding
from .attention import retrieve_attend
from .cache import ShardedChunkCache
from .layout import Layout, Piece, shard, unshard
from .whole import on_whole_sequence

sharding.register()

__all__ = [
    "Layout",
    "Piece",
    "ShardedChunkCache",
    "on_whole_sequence",
    "retrieve_attend",
    "shard",
    "unshard",
]
