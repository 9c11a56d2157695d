"""The operator over a sharded sequence: pool at home, search everywhere, attend where the chunks are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._checks import check_fused
from ..functional import _with_heads, pool_chunks, retrieve
from .agreement import agree, bits, check_device, facts
from .collectives import AllGather
from .exchange import EXCHANGES, Selection, at_home, merge
from .layout import Layout, Piece, require
from .plan import ExchangePlan, Sizes, plan_exchange

OP = "distributed.retrieve_attend"


class DistributedAux(NamedTuple):
    """What `retrieve_attend` knows beside its output, of this rank's tokens."""

    lse: Tensor  # [B, T, H]
    indices: Tensor  # int32 [B, T, R, k], chunks of the whole sequence
    scores: Tensor  # [B, T, R, k]
    plan: ExchangePlan
    chunk_embedding: Tensor  # [B, chunks, R, E], unit vectors of all chunks of the whole


def retrieve_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_embedding: Tensor,
    context_embedding: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    mesh: DeviceMesh,
    mesh_dim: str | int | None = None,
    layout: Layout | None = None,
    score_scale: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    scale: float | None = None,
    inclusive: bool = False,
    exchange: str = "auto",
    pool: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    deterministic: bool | None = None,
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, DistributedAux]:
    """`resona_ext.retrieve_attend` where each rank holds some of the tokens.

    The selection is that of one device, bit for bit: chunk embeddings are gathered (L / S of them), and
    every rank searches all chunks of the past. Then either the selected chunks or the queries travel,
    whichever are fewer bytes. Outputs and gradients are those of one device to rounding.

    Letters as there; T is the number of tokens that this rank holds. Every rank of the group has to call.
    Waits for the device several times: how much is exchanged depends on what was selected.

    Args:
        query: [B, T, H, D]. key, value: [B, T, Hkv, D].
        query_embedding, context_embedding: [B, T, R, E] or [B, T, E].
        chunk_size, top_k: S and k.
        mesh, mesh_dim: the ranks that share the sequence; mesh_dim may be left out in one dimension.
        layout: which rank holds what. Default: one piece per rank, in the order of the ranks, each a
            multiple of S tokens but the last (of its sequence, with cu_seqlens).
        score_scale: float32 [R]. sink: float32 [H]. The same on every rank.
        cu_seqlens: the borders of packed sequences (B = 1) in the whole, known on the host. Not with
            a layout, which has its own.
        scale: factor of <query, key>; default D ** -0.5.
        inclusive: a token also sees the chunk that it closes.
        exchange: "auto", "chunks" or "queries".
        pool: what makes chunk embeddings instead of `pool_chunks`: gets context_embedding, which may then
            be [B, T, ...], from a chunk border on, and cu_seqlens of what it got or None, and returns
            [B, its tokens // S, R, E] in the order of `pool_chunks`.
        deterministic: as in `resona_ext.retrieve_attend`.
        return_aux: also return log-sum-exp, indices, scores, the plan and the chunk embeddings.

    Returns:
        out [B, T, H, D], or (out, DistributedAux).

    Raises:
        ValueError: on every rank, when an argument breaks the contract on any of them.
        Errors of torch.distributed, when a rank is lost; the process group's timeout bounds the wait.
    """
    group = mesh.get_group(mesh_dim)
    rank = dist.get_rank(group)
    query_embedding = _with_heads(query_embedding)
    if pool is None:
        context_embedding = _with_heads(context_embedding)
    tensors = (query, key, value, query_embedding, context_embedding)
    borders = None if cu_seqlens is None else tuple(int(n) for n in cu_seqlens)
    own, error = None, ""
    try:
        checked = tensors if pool is None else (*tensors[:4], query_embedding)
        check_fused(OP, *checked, chunk_size, top_k, score_scale, sink, None, scale)
        tokens = list(context_embedding.shape[:2])
        as_wide = tokens == list(query.shape[:2])
        require(as_wide, "context_embedding", f"{list(query.shape[:2])} like query", tokens)
        _check_placement(tensors, mesh, layout, borders, group, chunk_size, exchange)
        sequences = layout.borders if layout is not None else borders or ()
        settings = (chunk_size, top_k, score_scale, sink, inclusive, sequences)
        pieces = None if layout is None else layout.pieces
        own = facts(query, key, query_embedding, *settings, pieces, _gradients_wanted(tensors))
    except (ValueError, RuntimeError) as problem:
        error = str(problem)
    lengths = agree(own, error, query.shape[1], mesh, group)
    if layout is None:
        layout = Layout.of_lengths(lengths, chunk_size, borders)

    chunks = _gather_chunks(context_embedding, pool, layout, rank, group)
    chunks = chunks.to(query_embedding.dtype)
    found = _search(query_embedding, chunks, layout, rank, top_k, inclusive)
    chunk, indices, scores = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    bias = None
    if score_scale is not None:
        bias = score_scale[:, None] * torch.where(indices >= 0, scores, 0.0)
    settings = (layout, rank, group, scale, deterministic)
    selection = Selection(query, key, value, chunk, bias, *settings)
    out, lse, plan = _attend(selection, exchange)
    if sink is not None:
        out, lse = merge((out, lse), (torch.zeros_like(out), sink.expand_as(lse)))
    out = out.to(query.dtype)
    return (out, DistributedAux(lse, indices, scores, plan, chunks)) if return_aux else out


def _check_placement(tensors, mesh, layout, borders, group, chunk_size, exchange) -> None:
    check_device(tensors[0], "query", mesh)
    require(
        exchange in ("auto", *EXCHANGES), "exchange", f"auto or one of {[*EXCHANGES]}", exchange
    )
    batch, tokens = tensors[0].shape[:2]
    require(borders is None or batch == 1, "query", "batch 1 with cu_seqlens", batch)
    if layout is None:
        return
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    require(borders is None, "cu_seqlens", "None with a layout", "both")
    require(layout.ranks == ranks, "layout", f"one for {ranks} ranks", layout.ranks)
    require(layout.chunk_size == chunk_size, "layout", f"chunks of {chunk_size}", layout.chunk_size)
    require(len(layout.borders) == 2 or batch == 1, "query", "batch 1 with packed sequences", batch)
    expected = f"{layout.tokens_of(rank)} tokens on rank {rank}, as the layout says"
    require(layout.tokens_of(rank) == tokens, "query", expected, tokens)


def _gradients_wanted(tensors) -> int:
    """Backward, too, is a conversation: either all ranks take part or none."""
    return bits(torch.is_grad_enabled() and t.requires_grad for t in tensors)


def _runs(layout: Layout, piece: Piece) -> list[tuple[int, int]]:
    """Where the sequences that a piece touches begin and end in it, clipped."""
    clipped = [
        (max(a, piece.start) - piece.start, min(b, piece.end) - piece.start)
        for a, b in itertools.pairwise(layout.borders)
        if a < piece.end and b > piece.start
    ]
    return clipped


def _cu_seqlens(runs: list[tuple[int, int]], device) -> Tensor:
    begin = runs[0][0]
    borders = [0, *(end - begin for _, end in runs)]
    return torch.tensor(borders, dtype=torch.int32, device=device)


def _gather_chunks(context: Tensor, pool, layout: Layout, rank: int, group) -> Tensor:
    """Unit vectors of all chunks of the whole, in the order of chunk rows: [B, chunks, R, E]."""
    if pool is None:

        def pool(rows: Tensor, borders: Tensor | None) -> Tensor:
            return pool_chunks(rows, layout.chunk_size, borders)

    pooled, before = [pool(context[:, :0], None)], 0
    for piece in layout.pieces[rank]:
        rows = context[:, before : before + piece.length]
        before += piece.length
        runs = _runs(layout, piece)
        if len(layout.borders) == 2 or not runs:
            pooled.append(pool(rows, None))
            continue
        count = sum((end - begin) // layout.chunk_size for begin, end in runs)
        pooled.append(pool(rows, _cu_seqlens(runs, rows.device))[:, :count])
    own = torch.cat(pooled, dim=1)
    counts = [
        sum(n for p in own_pieces for _, n, _ in layout.chunks_of(p))
        for own_pieces in layout.pieces
    ]
    most = max(counts)
    own = torch.nn.functional.pad(own, (0, 0, 0, 0, 0, most - own.shape[1]))
    every = AllGather.apply(own, group).movedim(0, 1).flatten(1, 2)  # [B, ranks * most, R, E]
    position = torch.empty(layout.chunks, dtype=torch.long)
    for r, own_pieces in enumerate(layout.pieces):
        at = r * most
        for first, count, _ in itertools.chain.from_iterable(map(layout.chunks_of, own_pieces)):
            position[first : first + count] = at + torch.arange(count)
            at += count
    return every.index_select(1, position.to(every.device))


def _search(
    query_embedding: Tensor,
    chunks: Tensor,
    layout: Layout,
    rank: int,
    top_k: int,
    inclusive: bool,
):
    """Per run of rows: chunk rows int64, indices, scores. A sequence that began on another rank is
    searched by itself, for its queries stand at the end of its context; those that begin here together.
    Inclusive, each by itself: a context of one token more moves every query on by one.
    """
    size, before = layout.chunk_size, 0
    for piece in layout.pieces[rank]:
        runs = _runs(layout, piece)
        begun = bool(runs) and layout.borders[layout.sequence_of(piece.start)] < piece.start
        parts = [runs[:1], runs[1:]] if begun else [[], runs]
        if inclusive:
            parts = [[run] for run in runs]
        for i, part in enumerate(parts):
            if not part:
                continue
            first, last = part[0][0], part[-1][1]
            query = query_embedding[:, before + first : before + last]
            sequence = layout.sequence_of(piece.start + first)
            offset = layout.chunk_begin[sequence]
            if i == 0 or len(part) == 1:
                length = piece.start + last - layout.borders[sequence] + int(inclusive)
                own = chunks[:, offset : min(offset + length // size, chunks.shape[1])]
                # The dummy token may close a chunk, behind all queries.
                missing = length // size - own.shape[1]
                own = torch.nn.functional.pad(own, (0, 0, 0, 0, 0, missing))
                found = retrieve(query, own, chunk_size=size, top_k=top_k, context_length=length)
                chunk_begin = torch.full((last - first,), offset, device=query.device)
            else:
                own = chunks[:, offset : offset + (last - first) // size]
                missing = (last - first) // size - own.shape[1]
                own = torch.nn.functional.pad(own, (0, 0, 0, 0, 0, missing))
                borders = _cu_seqlens(part, query.device)
                settings = {"chunk_size": size, "top_k": top_k, "context_length": last - first}
                found = retrieve(query, own, cu_seqlens=borders, **settings)
                counts = [(end - begin) // size for begin, end in part]
                begins = torch.tensor([offset, *counts]).cumsum(0)[:-1].to(query.device)
                lengths = torch.tensor([end - begin for begin, end in part], device=query.device)
                chunk_begin = begins.repeat_interleave(lengths)
            global_row = found.indices.long() + chunk_begin[:, None, None]
            yield torch.where(found.indices >= 0, global_row, -1), found.indices, found.scores
        before += piece.length
    nothing = query_embedding[:, :0]
    found = retrieve(nothing, chunks[:, :0], chunk_size=size, top_k=top_k, context_length=0)
    yield found.indices.long(), found.indices, found.scores


def _attend(s: Selection, exchange: str) -> tuple[Tensor, Tensor, ExchangePlan]:
    """out, float32 or wider, and lse."""
    candidates = {name: make(s) for name, make in EXCHANGES.items()}
    counts = torch.stack([x.count for x in candidates.values()])
    dist.all_reduce(counts, group=s.group)
    sizes = Sizes(
        heads=s.query.shape[2],
        kv_heads=s.key.shape[2],
        retrieval_heads=s.chunk.shape[2],
        head_dim=s.query.shape[3],
        top_k=s.chunk.shape[3],
        chunk_size=s.layout.chunk_size,
        itemsize=s.query.element_size(),
    )
    plan = plan_exchange(sizes, *counts.tolist(), exchange)
    chosen = candidates[plan.exchange]
    chosen.start()
    out, lse = at_home(s)
    foreign = chosen.finish()
    out, lse = merge((out.to(lse.dtype), lse), (foreign[0].to(lse.dtype), foreign[1]))
    return out, lse, plan
