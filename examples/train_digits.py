"""A small vision transformer on scikit-learn's digits, adapted to permuted classes by LoCon, LoHa and LoKr.

    python examples/train_digits.py --output digits

Trains the base, freezes it, trains each adapter in turn on classes in another order, saves it, merges it with
`lycoris merge`, and shows that the merged model answers as the live one does. Loss curves go to losses.png. Needs
scikit-learn, and matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lycoris import nn, optim, tensor
from lycoris.algorithms import LoConModule, LoHaModule, LoKrModule, save
from lycoris.algorithms.files import write_safetensors
from lycoris.merge import AdapterInput, MergeOptions, merge
from lycoris.tensor import Generator, Tensor
from plans.core import ElementKind

CLASSES, SIDE, PATCH = 10, 8, 2
TOKENS, PIXELS = (SIDE // PATCH) ** 2, PATCH**2
KINDS = {"bf16": ElementKind.BF16, "fp32": ElementKind.F32}
ALGORITHMS = {"locon": LoConModule, "loha": LoHaModule, "lokr": LoKrModule}


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long."""

    width: int = 64
    heads: int = 4
    blocks: int = 3
    rank: int = 4
    batch: int = 128
    steps: int = 600
    adapter_steps: int = 400
    images: int = 1797
    kind: ElementKind = ElementKind.F32
    seed: int = 0


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 pixels as tokens, arXiv:2010.11929, with the tokens' mean in place of a class token."""

    def __init__(self, s: Settings) -> None:
        generator = Generator(s.seed)
        options = {"kind": s.kind, "generator": generator}
        self.embed = nn.Linear(PIXELS, s.width, **options)
        self.position = tensor.randn((TOKENS, s.width), 0.0, 0.02, **options, requires_grad=True)
        self.blocks = [nn.TransformerBlock(s.width, s.heads, **options) for _ in range(s.blocks)]
        self.norm = nn.LayerNorm(s.width, kind=s.kind)
        self.head = nn.Linear(s.width, CLASSES, **options)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [batch, tokens, pixels] -> logits [batch, classes]."""
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Digits:
    """Images as patches, and classes: for training and for testing."""

    patches: Tensor
    classes: np.ndarray
    test_patches: Tensor
    test_classes: np.ndarray


def load(s: Settings) -> Digits:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(s.seed).permutation(len(found.target))[: s.images]
    images, classes = (found.images[order] / 8 - 1).astype(np.float32), found.target[order].astype(np.int32)
    grid = images.reshape(-1, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).transpose(0, 1, 3, 2, 4)
    patches, held = grid.reshape(-1, TOKENS, PIXELS), len(order) // 5
    train, test = (tensor.from_numpy(part, kind=s.kind) for part in (patches[held:], patches[:held]))
    return Digits(train, classes[held:], test, classes[:held])


def fit(model, parameters, digits, classes, s: Settings, steps: int, rate: float, tick) -> list[float]:
    """Train by AdamW with warm-up and a cosine; gives the loss of every step."""
    optimizer = optim.AdamW(
        parameters, rate, decay=0.01, schedule=optim.warmup(optim.cosine(steps), max(1, steps // 10))
    )
    draw = np.random.default_rng(s.seed + 1)
    losses = []
    model.train()
    for _ in range(steps):
        chosen = draw.choice(len(classes), min(s.batch, len(classes)), replace=False).astype(np.int32)
        logits = model(digits.patches.index_select(0, tensor.from_numpy(chosen)))
        loss = tensor.cross_entropy_loss(logits, tensor.from_numpy(classes[chosen]))
        loss.backward()
        optimizer.step(scale=optim.clip_by_norm(parameters, 1.0))
        optimizer.zero_grad()
        losses.append(loss.detach())
        tick()
    return [value.item() for value in losses]


def answers(model, patches: Tensor) -> np.ndarray:
    model.train(False)
    with tensor.no_grad():
        return model(patches).numpy().astype(np.float32).argmax(1)


def digest(arrays: dict[str, np.ndarray]) -> str:
    """A fingerprint of every bit."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()[:16]


def run(s: Settings, output: Path, progress: Progress) -> dict[str, dict[str, object]]:
    """Train the base and every adapter; gives accuracies, losses and fingerprints by name."""
    output.mkdir(parents=True, exist_ok=True)
    digits, model = load(s), VisionTransformer(s)
    bar = progress.add_task("base", total=s.steps)
    losses = fit(
        model, list(model.trained().values()), digits, digits.classes, s, s.steps, 2e-3, lambda: progress.advance(bar)
    )
    base = model.state_dict()
    base_path = output / "base.safetensors"
    write_safetensors(base_path, base, overwrite=True)
    right = float((answers(model, digits.test_patches) == digits.test_classes).mean())
    report = {"base": {"accuracy": right, "losses": losses, "digest": digest(base)}}

    order = np.random.default_rng(s.seed + 2).permutation(CLASSES).astype(np.int32)
    for name, algorithm in ALGORITHMS.items():
        adapted = VisionTransformer(s)
        adapted.load_state_dict(base)
        modules = nn.adapt(adapted, algorithm, s.rank, seed=s.seed)
        bar = progress.add_task(name, total=s.adapter_steps)
        classes = order[digits.classes]
        losses = fit(
            adapted,
            nn.parameters_of(modules),
            digits,
            classes,
            s,
            s.adapter_steps,
            5e-3,
            lambda b=bar: progress.advance(b),
        )
        live = answers(adapted, digits.test_patches)
        adapter_path, merged_path = output / f"{name}.safetensors", output / f"merged-{name}.safetensors"
        save(adapter_path, {f"lycoris_{path}": module for path, module in modules.items()}, overwrite=True)
        merge(MergeOptions(base_path, (AdapterInput(adapter_path),), merged_path, overwrite=True))
        merged_model = VisionTransformer(s)
        merged_model.load_state_dict(safetensors.numpy.load_file(merged_path))
        merged = answers(merged_model, digits.test_patches)
        wanted = order[digits.test_classes]
        report[name] = {
            "accuracy": float((live == wanted).mean()),
            "merged accuracy": float((merged == wanted).mean()),
            "losses": losses,
            "digest": digest(safetensors.numpy.load_file(adapter_path)),
        }
    return report


def plot(report: dict[str, dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, row in report.items():
        axes.plot(row["losses"], label=f"{name}, accuracy {row['accuracy']:.3f}", linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Digits: base, then adapters to permuted classes")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("digits"), help="folder for models, adapters and the picture"
    )
    parser.add_argument("--kind", choices=sorted(KINDS), default="fp32", help="kind of weights and activations")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        report = run(Settings(kind=KINDS[given.kind], seed=given.seed), given.output, progress)
    for name, row in report.items():
        merged = f", merged {row['merged accuracy']:.4f}" if "merged accuracy" in row else ""
        last = row["losses"][-1]
        print(f"{name:6} accuracy {row['accuracy']:.4f}{merged}, last loss {last:.4f}, sha256 {row['digest']}")
    plot(report, given.output / "losses.png")


if __name__ == "__main__":
    main()
