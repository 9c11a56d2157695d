"""The language model around a backbone: embedding, blocks, head, and the branch in some of the blocks.

    x = norm(h);  y = mixer(x);  y = branch(x, embeddings, y) in the chosen blocks;  h = h + y
    h = h + mlp(norm(h)), where the cell has MLPs

No positions: what a mixer wants to know of them it makes itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from resona_ext import Resona
from resona_ext._layer_parts import SwiGLU

from .backbones import BACKBONES, Spec
from .config import Branch, Cell

Wanted = Tensor | tuple[Tensor, Tensor]
OUTPUTS = ("out", "out_proj", "o_proj")  # names of a mixer's last map: here and elsewhere


class WindowBranch(Resona):
    """Resona without a retriever: the chunks are the last top_k of those eligible."""

    def forward(self, x: Tensor, embeddings: Tensor, y: Tensor | None = None) -> Tensor:
        rows, steps = x.shape[:2]
        eligible = torch.arange(steps, device=x.device) // self.chunk_size
        chunk = eligible.unsqueeze(1) - 1 - torch.arange(self.top_k, device=x.device)
        indices = chunk.clamp(min=-1).to(torch.int32).view(1, steps, 1, -1)
        indices = indices.repeat(rows, 1, self.retrieval_heads, 1)
        return super().forward(x, embeddings, y, indices=indices)


class MlpBranch(nn.Module):
    """y + mlp(x), with as many trained parameters as the branch that it stands for."""

    def __init__(self, width: int, parameters: int) -> None:
        super().__init__()
        self.mlp = SwiGLU(width, max(1, round(parameters / (3 * width))))

    def forward(self, x: Tensor, embeddings: Tensor, y: Tensor) -> Tensor:
        return y + self.mlp(x)


def make_branch(branch: Branch, width: int) -> nn.Module | None:
    if branch.kind == "none":
        return None
    kind = WindowBranch if branch.kind == "window" else Resona
    resona = kind(width, branch.heads, **branch.options)
    return MlpBranch(width, trained_parameters(resona)) if branch.kind == "mlp" else resona


class Block(nn.Module):
    def __init__(self, cell: Cell, spec: Spec) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(cell.width)
        self.mixer = BACKBONES[cell.backbone].build(spec)
        self.branch: nn.Module | None = None
        self.mlp_norm = nn.RMSNorm(cell.width) if cell.mlp else None
        self.mlp = SwiGLU(cell.width, cell.mlp) if cell.mlp else None

    def forward(self, h: Tensor, embeddings: Tensor) -> Tensor:
        x = self.norm(h)
        reads_embeddings = getattr(self.mixer, "reads_embeddings", False)
        y = self.mixer(x, embeddings) if reads_embeddings else self.mixer(x)
        if self.branch is not None:
            y = self.branch(x, embeddings, y)
        h = h + y
        return h if self.mlp is None else h + self.mlp(self.mlp_norm(h))


class TokenHead(nn.Module):
    """Logits at the wanted positions: h [B, T, d], wanted as in RecallModel -> [N, V]."""

    def __init__(self, embedding: nn.Embedding, is_tied: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(embedding.embedding_dim)
        self.project = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
        if is_tied:
            self.project.weight = embedding.weight

    def forward(self, h: Tensor, wanted: Wanted) -> Tensor:
        return self.project(self.norm(h[wanted]))


@torch.no_grad()
def draw_as_zoology(mixer: nn.Module, std: float, layers: int) -> None:
    """Linear maps anew: weights of this std, that of the output over sqrt(2 layers), biases zero.

    A mixer then adds little to the stream at first, so that deep layers still see the token embedding.
    Mamba keeps the biases of its steps, which say how long it remembers.
    """
    for name, module in mixer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        is_output = name.rpartition(".")[2] in OUTPUTS
        nn.init.normal_(module.weight, std=std / math.sqrt(2 * layers) if is_output else std)
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)


class AutoencoderHead(nn.Module):
    """MAD's decoder for compression: every input from the last state plus a code of its position."""

    def __init__(self, embedding: nn.Embedding, length: int) -> None:
        super().__init__()
        width = embedding.embedding_dim
        self.register_buffer("code", sinusoids(length, width), persistent=False)
        hidden = [(nn.RMSNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2)]
        last = (nn.RMSNorm(width), nn.Linear(width, embedding.num_embeddings))
        self.decode = nn.Sequential(*(layer for group in (*hidden, last) for layer in group))

    def forward(self, h: Tensor, wanted: Wanted) -> Tensor:
        states = h[:, -1:] + self.code[: h.shape[1]]
        return self.decode(states[wanted])


def sinusoids(length: int, width: int) -> Tensor:
    """Fixed sines, then cosines, of position at falling frequencies: [length, width]."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(width // 2) / (width // 2))
    angle = torch.arange(length).unsqueeze(1) * frequency
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width % 2))


class RecallModel(nn.Module):
    def __init__(self, cell: Cell, device: str = "cpu") -> None:
        super().__init__()
        task = cell.make_task()
        self.embedding = nn.Embedding(task.vocabulary, cell.width)
        nn.init.normal_(self.embedding.weight, std=cell.embedding_std)
        self.dropout = nn.Dropout(cell.dropout)
        options = cell.branch.options
        specs = (
            Spec(
                cell.width,
                cell.heads,
                task.width,
                layer,
                cell.layers,
                device,
                cell.window,
                options.get("chunk_size", Spec.chunk_size),
                options.get("top_k", Spec.top_k),
            )
            for layer in range(cell.layers)
        )
        self.blocks = nn.ModuleList(Block(cell, spec) for spec in specs)
        if task.head == "autoencoder":
            self.head: nn.Module = AutoencoderHead(self.embedding, task.width)
        else:
            self.head = TokenHead(self.embedding, cell.tied)
        if cell.linear_std is not None:
            for block in self.blocks:
                draw_as_zoology(block.mixer, cell.linear_std, cell.layers)
        # Last, so that models with and without a branch start from the same backbone.
        for layer in cell.branch_layers:
            self.blocks[layer].branch = make_branch(cell.branch, cell.width)

    @property
    def branches(self) -> list[nn.Module]:
        return [block.branch for block in self.blocks if block.branch is not None]

    def forward(self, tokens: Tensor, wanted: Wanted) -> Tensor:
        """Logits [N, V] at the N wanted positions. tokens [B, T].

        wanted: bool [B, T], or rows [N] and columns [N], which spare the GPU counting them.
        """
        embeddings = self.dropout(self.embedding(tokens))
        h = embeddings
        for block in self.blocks:
            h = block(h, embeddings)
        return self.head(h, wanted)


def make_model(cell: Cell, device: str = "cpu") -> nn.Module:
    """A RecallModel, or a pretrained model that is called like one; `branches` are its branches."""
    if not cell.is_pretrained:
        return RecallModel(cell, device)
    from .pretrained import PretrainedModel  # needs transformers

    return PretrainedModel(cell)


def trained_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
