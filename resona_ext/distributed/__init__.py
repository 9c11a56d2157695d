"""One sequence over many devices: the operator with tokens sharded along a dimension of a DeviceMesh.

layout.py     which rank holds which tokens, and so which chunks
agreement.py  every rank checks what all ranks were given, so that a mistake is an error on each and no hang
exchange.py   how a query meets a chunk of another rank: the chunk travels, or the query does
plan.py       which of the two moves fewer bytes
attention.py  retrieve_attend
sharding.py   batch and heads of DTensors: rules for every operator, registered on import
"""

from . import sharding
from .attention import retrieve_attend
from .layout import Layout, Piece, shard, unshard

sharding.register()

__all__ = ["Layout", "Piece", "retrieve_attend", "shard", "unshard"]
