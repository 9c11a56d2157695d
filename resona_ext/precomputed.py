"""The paper's other retriever: selections made offline by a frozen encoder, for training and scoring.

Its language-model runs search beforehand, by cosine similarity in the space of a sentence encoder,
and train with the masks that come of it (appendix A.1 of arXiv 2503.22913).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class PrecomputedRetrieval:
    """Chooses chunks for every token from what an encoder says of their texts.

    The text is cut into chunks of S tokens, as the layer does it, and into blocks of `stride`. The
    tokens of a block search together: their query is the text of the `query_tokens` before the block,
    so nothing at or behind a token has a say in what it retrieves. Chunks that overlap the query's
    text are left out (they would match themselves), as are those that do not lie before the block.

    Args:
        encoder: gets a list of n texts and returns n vectors [n, E]: a tensor, an array or lists, as
            `SentenceTransformer(...).encode`. Called once per call, without gradients.
        chunk_size: S, that of the layers.
        top_k: chunks per token, k.
        decode: token ids (a list of ints) to text, as a tokenizer's `decode`. None: the encoder gets
            the ids themselves, int64 tensors [m].
        query_tokens: tokens that make a query. Default S.
        stride: tokens that share a query. Default S.

    Raises:
        ValueError: from any method, an argument does not fit, or the encoder returns something else.
    """

    def __init__(
        self,
        encoder: Callable[[list], Tensor],
        chunk_size: int,
        top_k: int,
        *,
        decode: Callable[[list[int]], str] | None = None,
        query_tokens: int | None = None,
        stride: int | None = None,
    ) -> None:
        self.encoder, self.decode = encoder, decode
        self.chunk_size, self.top_k = chunk_size, top_k
        self.query_tokens = chunk_size if query_tokens is None else query_tokens
        self.stride = chunk_size if stride is None else stride
        for name in ("encoder", "decode"):
            got = getattr(self, name)
            valid = callable(got) or (name == "decode" and got is None)
            _require(valid, name, "a callable", type(got).__name__)
        for name in ("chunk_size", "top_k", "query_tokens", "stride"):
            got = getattr(self, name)
            _require(type(got) is int and got >= 1, name, "an int of at least 1", got)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The `indices` of `Resona.forward` and the `resona_indices` of an augmented model.

        Args:
            input_ids: integers [B, T].
            attention_mask: [B, T], 1 at tokens and 0 at padding, left or right of them.
            cu_seqlens: [n + 1], borders of packed sequences (B = 1), which nothing crosses.

        Returns:
            int32 [B, T, 1, k] on the device of input_ids, best first, -1 unused.
        """
        spans = _spans(input_ids, attention_mask, cu_seqlens)
        rows = input_ids.cpu()
        texts, borders = [], []
        for row, first, count in spans:
            sequence = rows[row, first : first + count]
            chunks = sequence[: count // self.chunk_size * self.chunk_size].split(self.chunk_size)
            begins = range(self.stride, count, self.stride)
            queries = [sequence[max(0, begin - self.query_tokens) : begin] for begin in begins]
            chunks = chunks if count >= self.chunk_size else ()
            borders.append((len(texts), len(chunks), len(queries)))
            texts += [*chunks, *queries]
        vectors = self._encoded(texts)

        indices = torch.full((*input_ids.shape, 1, self.top_k), -1, dtype=torch.int32)
        for (row, first, count), (at, chunks, queries) in zip(spans, borders, strict=True):
            known, asked = vectors[at : at + chunks], vectors[at + chunks : at + chunks + queries]
            of_blocks = self._select(known, asked)
            own = indices[row, first : first + count, 0]
            for block in range(queries):
                begin = (block + 1) * self.stride
                own[begin : begin + self.stride] = of_blocks[block]
        return indices.to(input_ids.device)

    @torch.no_grad()
    def _encoded(self, texts: Sequence[Tensor]) -> Tensor:
        """Unit vectors float64 [n, E]."""
        if not texts:
            return torch.zeros(0, 1, dtype=torch.float64)
        given = list(texts) if self.decode is None else [self.decode(t.tolist()) for t in texts]
        vectors = torch.as_tensor(self.encoder(given)).detach().cpu().double()
        expected = f"[{len(texts)}, E]"
        valid = vectors.dim() == 2 and vectors.shape[0] == len(texts) and vectors.shape[1] >= 1
        _require(valid, "the result of encoder", expected, list(vectors.shape))
        finite = bool(vectors.isfinite().all())
        _require(finite, "the result of encoder", "finite numbers", "NaN or infinity")
        return torch.nn.functional.normalize(vectors, dim=-1, eps=1e-300)

    def _select(self, chunks: Tensor, queries: Tensor) -> Tensor:
        """The k chunks most similar to each query, ties to the earlier chunk: int32 [queries, k]."""
        begin = (torch.arange(len(queries)) + 1) * self.stride
        end = (torch.arange(len(chunks)) + 1) * self.chunk_size
        eligible = end <= (begin - self.query_tokens).unsqueeze(1)
        scores = (queries @ chunks.T).masked_fill(~eligible, -torch.inf)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]
        chosen = torch.where(eligible.gather(1, order), order, -1)
        unused = self.top_k - chosen.shape[1]
        return torch.nn.functional.pad(chosen, (0, unused), value=-1).to(torch.int32)


def _spans(
    input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[int, int, int]]:
    """(row, first token, tokens) of every sequence."""
    is_integer = not input_ids.is_floating_point() and input_ids.dtype != torch.bool
    valid = input_ids.dim() == 2 and is_integer
    got = f"{input_ids.dtype} {list(input_ids.shape)}"
    _require(valid, "input_ids", "integers [B, T]", got)
    batch, length = input_ids.shape
    if cu_seqlens is not None:
        _require(attention_mask is None, "attention_mask", "None with cu_seqlens", "both")
        borders = cu_seqlens.tolist()
        valid = batch == 1 and len(borders) >= 1 and borders[0] == 0 and borders[-1] == length
        valid = valid and borders == sorted(borders)
        _require(valid, "cu_seqlens", f"borders from 0 to {length} of a batch of 1", borders)
        return [(0, a, b - a) for a, b in itertools.pairwise(borders)]
    if attention_mask is None:
        return [(row, 0, length) for row in range(batch)]
    shape = list(attention_mask.shape)
    _require(shape == [batch, length], "attention_mask", [batch, length], shape)
    spans = []
    for row, mask in enumerate(attention_mask):
        real = (mask != 0).nonzero().flatten().tolist()
        is_whole = not real or real[-1] - real[0] + 1 == len(real)
        _require(is_whole, "attention_mask", "no padding between tokens", f"a hole in row {row}")
        spans.append((row, real[0] if real else 0, len(real)))
    return spans


def _require(ok: bool, argument: str, expected: object, got: object) -> None:
    if not ok:
        raise ValueError(f"PrecomputedRetrieval: {argument}: expected {expected}, got {got}")
