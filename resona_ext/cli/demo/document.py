"""Retrieval over a real document: for a passage, which earlier passages does the operator bring?

The document is cut into passages of 64 words, which are the operator's chunks. Every word is an
embedding; the query of a word is the mean of its passage, so all words of a passage search alike.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ...functional import retrieve_attend
from ..errors import CliError
from .embedding import embed_words, np

PASSAGE_WORDS = 64
MIN_PASSAGES = 4
WORD = re.compile(r"\w+")


@dataclass
class Document:
    name: str
    text: str
    sections: list[tuple[int, str]]  # (first character, title), ascending; may be empty


@dataclass
class Passage:
    text: str
    section: str | None


@dataclass
class Retrieval:
    passages: list[Passage]
    indices: torch.Tensor  # int32 [passages, k], earlier passages, best first, -1 unused
    scores: torch.Tensor  # float32 [passages, k]
    words: int
    embedding_seconds: float
    operator_seconds: float


def load(path: Path | None) -> Document:
    """The file, or the reference texts that come with every CPython."""
    if path is None:
        return _python_topics()
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CliError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    words = sum(1 for _ in WORD.finditer(text))
    if words < MIN_PASSAGES * PASSAGE_WORDS:
        raise CliError(
            f"{path} has {words} words; the document part needs at least "
            f"{MIN_PASSAGES * PASSAGE_WORDS}, that is {MIN_PASSAGES} passages of {PASSAGE_WORDS}"
        )
    return Document(str(path), text, [])


def _python_topics() -> Document:
    from pydoc_data.topics import topics

    sections, parts, begin = [], [], 0
    for title in sorted(topics):
        sections.append((begin, title))
        parts.append(topics[title])
        begin += len(topics[title])
    return Document(
        "pydoc_data.topics, the language reference inside CPython", "".join(parts), sections
    )


def retrieve_passages(
    document: Document, passage_words: int = PASSAGE_WORDS, top_k: int = 3, seed: int = 0
) -> Retrieval:
    """Run the operator over the whole document and read off what each passage retrieved."""
    spans = [match.span() for match in WORD.finditer(document.text)]
    words = [document.text[begin:end].lower() for begin, end in spans]
    started = time.perf_counter()
    embedding = embed_words(words, passage_words, seed=seed)
    embedded = time.perf_counter()
    aux = _run_operator(embedding, passage_words, top_k)
    finished = time.perf_counter()

    # The first word of passage j stands at j * passage_words: exactly passages 0 .. j - 1 are past.
    count = len(words) // passage_words
    first = torch.arange(count) * passage_words
    return Retrieval(
        passages=[_passage(document, spans, j, passage_words) for j in range(count)],
        indices=aux.indices[0, first, 0],
        scores=aux.scores[0, first, 0],
        words=len(words),
        embedding_seconds=embedded - started,
        operator_seconds=finished - embedded,
    )


def _run_operator(embedding: np.ndarray, passage_words: int, top_k: int):
    dim = embedding.shape[1]
    means = [part.mean(axis=0) for part in _split(embedding, passage_words)]
    query = np.repeat(np.stack(means), passage_words, axis=0)[: len(embedding)]
    context_tokens = torch.from_numpy(embedding).view(1, -1, 1, dim)
    query_tokens = torch.from_numpy(query).view(1, -1, 1, dim)
    _, aux = retrieve_attend(
        query_tokens,
        context_tokens,
        context_tokens,
        query_tokens,
        context_tokens,
        chunk_size=passage_words,
        top_k=top_k,
        return_aux=True,
    )
    return aux


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive groups of `size` rows, the last one perhaps shorter."""
    return np.split(rows, range(size, len(rows), size))


def _passage(document: Document, spans: list[tuple[int, int]], j: int, size: int) -> Passage:
    begin, end = spans[j * size][0], spans[(j + 1) * size - 1][1]
    title = None
    for first, section in document.sections:
        if first > begin:
            break
        title = section
    return Passage(" ".join(document.text[begin:end].split()), title)


def same_section_share(found: Retrieval) -> tuple[float, float] | None:
    """The share of retrieved passages from the query's section, and that of random past ones."""
    if found.passages[0].section is None:
        return None
    sections = np.array([passage.section for passage in found.passages])
    row, slot = (found.indices >= 0).nonzero(as_tuple=True)
    retrieved = found.indices[row, slot].numpy()
    share = (sections[row.numpy()] == sections[retrieved]).mean()
    chance = [(sections[:j] == sections[j]).mean() for j in range(1, len(sections))]
    return float(share), float(np.mean(chance))
