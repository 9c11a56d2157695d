"""Put Resona into a small Mamba-2 and fine-tune it on a text file.

    python examples/finetune_mamba2.py --out run             # the text of the demo, a model from scratch
    python examples/finetune_mamba2.py --out run --resume    # go on after an interruption
    python examples/finetune_mamba2.py --out run --text book.txt --model ./mamba2-130m-hf --lr 1e-5

Without --model it is a Mamba-2 of random weights that reads bytes, so nothing is downloaded. DIR gets
checkpoint.pt (to resume), loss.png, resona.safetensors (the new layers, for `load_resona`) and backbone/
(for `from_pretrained`). A resumed run ends with the same weights as one that never stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from resona_ext import augment, save_resona
from resona_ext.cli.demo.document import load as load_text
from resona_ext.cli.errors import CliError
from resona_ext.cli.progress import ProgressBar

HELD_OUT = 0.1  # of the text, its end
WARMUP = 0.05  # of the steps
NOT_COMPARED = ("out", "resume", "steps_now", "device")  # may differ when a run is resumed


@dataclass
class Run:
    """All that a checkpoint holds besides weights and optimizer."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # of every step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text; default: the language reference inside CPython",
    )
    add(
        "--model",
        metavar="PATH",
        help="a pretrained Mamba-2 with tokenizer; default: random weights, bytes",
    )
    add("--steps", type=int, default=300)
    add("--steps-now", type=int, metavar="N", help="stop after N steps; continue with --resume")
    add("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=256, help="tokens per sequence")
    add("--lr", type=float, default=1e-3, help="of the backbone")
    add("--resona-lr", type=float, default=3e-3, help="of the new layers, which start from nothing")
    add("--freeze-backbone", action="store_true", help="train the new layers only")
    add("--layers", default="ends+middle", help="or ids, as 0,12,23")
    add("--chunk-size", type=int, default=16)
    add("--top-k", type=int, default=4)
    add("--save-every", type=int, default=50, metavar="N")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for name in ("steps", "batch", "length", "save_every", "chunk_size", "top_k"):
        if getattr(arguments, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}"
            )
    return arguments


def make_model(arguments: argparse.Namespace):
    """The plain model, and what turns a text into a list of token ids."""
    try:
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            Mamba2Config,
            Mamba2ForCausalLM,
        )
    except ModuleNotFoundError as error:
        raise CliError(f"{error}; pip install 'resona_ext[transformers,demo]'") from error

    if arguments.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        return model, lambda text: tokenizer(text)["input_ids"]
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=4,
        num_heads=8,
        head_dim=32,
        state_size=16,
        n_groups=1,
        chunk_size=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Mamba2ForCausalLM(config), lambda text: list(text.encode())


def split(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) tokens."""
    border = len(ids) - int(HELD_OUT * len(ids))
    if len(ids) - border < length:
        raise CliError(
            f"the text has {len(ids)} tokens; --length {length} needs {10 * length} or more"
        )
    return ids[:border], ids[border:]


def draw(ids: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[batch, length] windows from random places."""
    first = torch.randint(len(ids) - length + 1, (batch, 1), generator=generator)
    return ids[first + torch.arange(length)]


@torch.no_grad()
def held_out_loss(model, ids: Tensor, arguments: argparse.Namespace) -> float:
    """Always the same windows, evenly spread."""
    model.eval()
    first = torch.linspace(0, len(ids) - arguments.length, arguments.batch).long().unsqueeze(1)
    batch = ids[first + torch.arange(arguments.length)].to(arguments.device)
    loss = model(batch, labels=batch, use_cache=False).loss.item()
    model.train()
    return loss


def rate(step: int, steps: int) -> float:
    """Warm-up, then cosine to a tenth: the factor of both learning rates."""
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def save_checkpoint(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, settings: dict, device: str) -> dict:
    if not path.exists():
        raise CliError(f"--resume: there is no {path}")
    state = torch.load(path, map_location=device, weights_only=True)
    changed = {
        k: (state["settings"].get(k), v)
        for k, v in settings.items()
        if state["settings"].get(k) != v
    }
    if changed:
        told = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())
        raise CliError(f"--resume: the settings of {path} differ: {told}")
    return state


def plot(path: Path, run: Run) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(
        range(1, len(run.losses) + 1), run.losses, color="#8a8f98", linewidth=1, label="training"
    )
    steps, losses = zip(*run.held_out, strict=True)
    axes.plot(
        steps,
        losses,
        color="#c8442c",
        linewidth=2,
        marker="o",
        label=f"held out, {losses[-1]:.3f} at the end",
    )
    axes.set(title="Mamba-2 with Resona", xlabel="training steps", ylabel="loss per token, nats")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def train(arguments: argparse.Namespace) -> Run:
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "checkpoint.pt"
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in NOT_COMPARED}
    if path.exists() and not arguments.resume:
        raise CliError(f"{path} exists: --resume goes on from it, another --out starts anew")

    model, encode = make_model(arguments)
    training, held_out = split(
        torch.tensor(encode(load_text(arguments.text).text)), arguments.length
    )
    by_id = arguments.layers != "ends+middle"
    layers = [int(i) for i in arguments.layers.split(",")] if by_id else arguments.layers
    augmentation = augment(
        model, layers, chunk_size=arguments.chunk_size, top_k=arguments.top_k, key_conv=2
    )
    if arguments.freeze_backbone:
        augmentation.freeze_backbone()
    model.to(arguments.device).train()
    optimizer = torch.optim.AdamW(augmentation.parameter_groups(arguments.lr, arguments.resona_lr))
    base_rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(arguments.seed)

    run = Run()
    if arguments.resume:
        state = load_checkpoint(path, settings, arguments.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        run = Run(**state["run"])
    else:
        run.held_out.append((0, held_out_loss(model, held_out, arguments)))

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": vars(run)}
        save_checkpoint(path, {**state, "generator": generator.get_state(), "settings": settings})
        save_resona(augmentation, arguments.out / "resona.safetensors")
        plot(arguments.out / "loss.png", run)

    bar = ProgressBar("training", arguments.steps)
    last = min(arguments.steps, run.step + (arguments.steps_now or arguments.steps))
    while run.step < last:
        batch = draw(training, arguments.batch, arguments.length, generator).to(arguments.device)
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base * rate(run.step, arguments.steps)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step += 1
        run.losses.append(loss.item())
        if run.step % arguments.save_every == 0 or run.step == arguments.steps:
            run.held_out.append((run.step, held_out_loss(model, held_out, arguments)))
        if run.step % arguments.save_every == 0 or run.step == last:
            save()
        bar.update(run.step, f"loss {run.losses[-1]:.3f}")
    if run.step == arguments.steps:
        model.save_pretrained(arguments.out / "backbone")
    return run


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run = train(arguments)
    except CliError as error:
        print(f"finetune_mamba2: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nfinetune_mamba2: interrupted; --resume goes on from {arguments.out}",
            file=sys.stderr,
        )
        return 130
    (_, first), (step, latest) = run.held_out[0], run.held_out[-1]
    print(
        f"held-out loss {first:.3f} at the start, {latest:.3f} after {step} steps; see {arguments.out}"
    )
    if run.step < arguments.steps:
        print(f"stopped after {run.step} of {arguments.steps} steps; --resume goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
