"""Word vectors from one document and nothing else: PPMI-SVD times idf.

Words that keep the same company get near vectors (positive pointwise mutual information of
neighbours, factored), and a word found in every passage weighs little (inverse document
frequency). Learnt by counting, in about a second, with no model to download.
"""

from __future__ import annotations

from collections import Counter

try:
    import numpy as np
except ModuleNotFoundError:  # an extra: the other commands work without it, and demo asks for it
    np = None

MAX_VOCABULARY = 3000  # rarer words get the zero vector; the count matrix is dense
WINDOW = 5  # neighbours counted on either side


def embed_words(words: list[str], passage_size: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    """One vector per word of the document, float32 [len(words), dim]."""
    ids, size = _vocabulary_ids(words)
    vectors = _factor(_ppmi(ids, size), dim, seed)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    vectors *= _idf(ids, size, passage_size)[:, None]
    known = np.vstack([vectors, np.zeros((1, dim))])  # id -1 selects the zero row
    return known[ids].astype(np.float32)


def _vocabulary_ids(words: list[str]) -> tuple[np.ndarray, int]:
    """Each word's rank by frequency, -1 beyond the vocabulary."""
    common = Counter(words).most_common(MAX_VOCABULARY)
    rank = {word: index for index, (word, _) in enumerate(common)}
    return np.array([rank.get(word, -1) for word in words]), len(rank)


def _ppmi(ids: np.ndarray, size: int) -> np.ndarray:
    """max(0, log P(a, b) / (P(a) P(b))) over pairs within the window, [size, size]."""
    left = np.concatenate([ids[:-offset] for offset in range(1, WINDOW + 1)])
    right = np.concatenate([ids[offset:] for offset in range(1, WINDOW + 1)])
    both = (left >= 0) & (right >= 0)
    count = np.bincount(left[both] * size + right[both], minlength=size * size)
    count = count.reshape(size, size).astype(np.float32)
    count += count.T
    occurrence = count.sum(axis=1)
    row, column = count.nonzero()
    found = count[row, column] * occurrence.sum() / (occurrence[row] * occurrence[column])
    count[row, column] = np.maximum(np.log(found), 0)
    return count


def _factor(matrix: np.ndarray, dim: int, seed: int, oversample: int = 16) -> np.ndarray:
    """U |lambda|^(1/2) of a symmetric matrix, [size, dim], by randomised subspace iteration."""
    size = len(matrix)
    start = np.random.default_rng(seed).standard_normal((size, min(size, dim + oversample)))
    basis = start.astype(matrix.dtype)
    for _ in range(4):
        basis, _ = np.linalg.qr(matrix @ basis)
    eigenvalues, rotation = np.linalg.eigh(basis.T @ matrix @ basis)
    best = np.argsort(-np.abs(eigenvalues))[:dim]
    vectors = (basis @ rotation[:, best]) * np.abs(eigenvalues[best]) ** 0.5
    return np.pad(vectors, ((0, 0), (0, dim - len(best))))


def _idf(ids: np.ndarray, size: int, passage_size: int) -> np.ndarray:
    """log of passages over the passages that hold the word, smoothed; [size]."""
    passage = np.arange(len(ids)) // passage_size
    known = ids >= 0
    pairs = np.unique(passage[known] * size + ids[known])
    document_frequency = np.bincount(pairs % size, minlength=size)
    return np.log((passage[-1] + 2) / (document_frequency + 1))
