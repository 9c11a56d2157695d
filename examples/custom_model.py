"""The operator in a model of one's own: a recurrent network that learns to copy by retrieval.

    python examples/custom_model.py

Each sequence is a random passage and then the same passage again; the second half is to be predicted.
A recurrent state of 64 numbers cannot hold the passage. With one call of the operator, each token looks
up where it stood before and reads what followed.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resona_ext  # noqa: F401  (registers torch.ops.resona)

VOCABULARY, WIDTH = 512, 64


class Copier(nn.Module):
    """Embedding, GRU, and beside it attention to the past tokens that followed the current one."""

    def __init__(self, retrieval: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mixer = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.query, self.key, self.value, self.out = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.retrieval = retrieval

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> logits [B, T, vocabulary]."""
        e = self.embedding(ids)
        y, _ = self.mixer(e)
        if self.retrieval:
            y = y + self.retrieve(e)
        return self.head(y)

    def retrieve(self, e: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]: one head, chunks of one token, the 4 best of them."""
        # A chunk is searched by the token before it and read by the token itself.
        before = F.pad(e, (0, 0, 1, 0))[:, :-1]

        def one_head(x: Tensor) -> Tensor:
            return x.unsqueeze(2)  # [B, T, 1, d]

        found, _, _, _ = torch.ops.resona.fused_retrieve_attend(
            one_head(self.query(e)),
            one_head(self.key(before)),
            one_head(self.value(e)),
            one_head(e),  # what each token looks for
            one_head(before),  # where it can be found
            chunk_size=1,
            top_k=4,
        )
        return self.out(found.squeeze(2))


def passages(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[batch, 2 * length]: a passage of distinct tokens, twice."""
    order = torch.rand(batch, VOCABULARY, generator=generator).argsort(dim=1)
    return order[:, :length].repeat(1, 2)


def train(retrieval: bool, steps: int, length: int = 64, batch: int = 16) -> float:
    """The share of the second half that is right after training, on new passages."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Copier(retrieval)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = passages(batch, length, generator)
        logits = model(ids[:, :-1])[:, length:]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, length + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        ids = passages(64, length, generator)
        right = model(ids[:, :-1])[:, length:].argmax(-1) == ids[:, length + 1 :]
    return right.float().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(argv).steps
    for retrieval in (False, True):
        share = train(retrieval, steps)
        print(
            f"{'with' if retrieval else 'without'} retrieval: {share:.1%} of the copied tokens right"
        )


if __name__ == "__main__":
    main()
