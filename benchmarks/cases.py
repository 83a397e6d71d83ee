"""What is measured, against what, and the gate that fails a run: the speed table as data."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lycoris.ops import factorization
from plans.core import ElementKind
from plans.weight import Hadamard, Kronecker, LowRank, Sink, Source, WeightDescriptor

BF16, F16, F32 = ElementKind.BF16, ElementKind.F16, ElementKind.F32


class Limit(enum.Enum):
    """What a time is compared with; the value is its name in the tables."""

    COPY = "copy"
    COPY_AND_A_HALF = "1.5 x copy"
    FILL = "fill"
    PEER = "lycoris-lora"
    PEFT = "PEFT"
    TORCH = "torch"
    LIGER = "Liger-Kernel"
    CUBLAS = "cuBLAS"
    CUDNN = "cuDNN"
    CP = "cp"
    CP_SYNCED = "cp, synced"
    DISK = "write and sync"
    BUDGET = "budget"


Sources = Callable[[int, int, ElementKind], tuple[Source, ...]]


def _locon(rank: int, count: int = 1) -> Sources:
    return lambda out, channels, kind: (LowRank(rank, kind, kind),) * count


def _loha(rank: int) -> Sources:
    return lambda out, channels, kind: (Hadamard(LowRank(rank, kind, kind), LowRank(rank, kind, kind)),)


def _lokr(factor: int, rank: int = 0) -> Sources:
    """LyCORIS's split of both axes by ``factor``; w1 full, w2 full or of ``rank``."""

    def sources(out: int, channels: int, kind: ElementKind) -> tuple[Source, ...]:
        (a, c), (b, d) = factorization(out, factor), factorization(channels, factor)
        return (Kronecker(a, b, c, d, kind, LowRank(rank, kind, kind) if rank else kind),)

    return sources


@dataclass(frozen=True)
class Algorithm:
    """An adapter over a linear weight: its name in the tables, its sources, and what a merge does with them."""

    title: str
    sources: Sources
    merge: Sink = Sink.MERGE


ALGORITHMS: dict[str, Algorithm] = {
    "locon-r16": Algorithm("LoCon r=16", _locon(16)),
    "locon-r64": Algorithm("LoCon r=64", _locon(64)),
    "two-locon-r16": Algorithm("two LoCons r=16", _locon(16, count=2)),
    "dora-r16": Algorithm("LoCon r=16, DoRA by row", _locon(16), Sink.DORA_ROW),
    "loha-r16": Algorithm("LoHa r=16", _loha(16)),
    "loha-r64": Algorithm("LoHa r=64", _loha(64)),
    "lokr-1": Algorithm("LoKr factor -1", _lokr(-1)),
    "lokr-1-r16": Algorithm("LoKr factor -1, w2 r=16", _lokr(-1, 16)),
    "lokr8": Algorithm("LoKr factor 8", _lokr(8)),
    "lokr8-r16": Algorithm("LoKr factor 8, w2 r=16", _lokr(8, 16)),
}
FIVE = ("locon-r16", "loha-r16", "lokr-1", "lokr8", "lokr8-r16")
SIX = (*FIVE, "lokr-1-r16")

LARGE = ((12288, 3072), (14336, 4096))
SMALL = ((3072, 3072), (1280, 1280))


@dataclass(frozen=True)
class WeightRow:
    """One bf16 weight: ``merge`` into it, settled or not, or the ``delta`` alone.

    ``gate`` is the largest ratio to the limit, None where a number is only shown.
    """

    work: str
    out_features: int
    in_features: int
    algorithm: str
    factors: ElementKind
    limit: Limit
    gate: float | None

    def __str__(self) -> str:
        return f"{self.work.replace(', ', '-')}-{self.shape}-{self.algorithm}-{self.factors.value}"

    @property
    def shape(self) -> str:
        """Rows x columns."""
        return f"{self.out_features}x{self.in_features}"

    def descriptor(self) -> WeightDescriptor:
        """The plan's problem; merges look for results that are not finite. ``lycoris merge`` also settles."""
        algorithm, merge = ALGORITHMS[self.algorithm], self.work.startswith("merge")
        sink = algorithm.merge if merge else Sink.DELTA
        return WeightDescriptor(
            self.out_features,
            self.in_features,
            algorithm.sources(self.out_features, self.in_features, self.factors),
            out=BF16,
            base=BF16 if merge else None,
            sink=sink,
            magnitude=self.factors if sink is Sink.DORA_ROW else None,
            check_finite=merge,
            settled=self.work.endswith("settled"),
        )


_TABLE = (
    ("merge", LARGE, ("locon-r16", "lokr-1", "lokr-1-r16", "lokr8", "lokr8-r16"), (BF16,), Limit.COPY, 1.06),
    ("merge", LARGE, ("loha-r16", "locon-r64", "two-locon-r16"), (BF16,), Limit.COPY, 1.12),
    ("merge", LARGE, ("dora-r16",), (BF16,), Limit.COPY_AND_A_HALF, 1.12),
    ("merge", LARGE, ("loha-r64",), (BF16,), Limit.COPY, 1.25),
    ("merge", LARGE, FIVE, (F16, F32), Limit.COPY, 1.25),
    ("merge", SMALL, SIX, (BF16,), Limit.COPY, 1.15),
    ("delta", (*LARGE, *SMALL), SIX, (BF16,), Limit.FILL, 1.10),
    ("merge, settled", (LARGE[0],), ("locon-r16", "locon-r64", "loha-r16", "lokr8-r16"), (BF16,), Limit.COPY, None),
)
WEIGHT_ROWS = tuple(
    WeightRow(work, *shape, algorithm, kind, limit, gate)
    for work, shapes, algorithms, kinds, limit, gate in _TABLE
    for kind in kinds
    for shape in shapes
    for algorithm in algorithms
)

# "At least 2x faster" is half the peer's time.
PEER_ROWS = tuple(
    WeightRow("merge", *shape, algorithm, BF16, Limit.PEER, 0.5) for shape in (SMALL[0], *LARGE) for algorithm in FIVE
)

GROUPED_GATE = 1.15
RUN_BUDGET_SECONDS = 8e-6
COMMAND_GATE = 1.3

_ONE, _THREE = (1, 1), (3, 3)
SDXL_UNET: tuple[tuple[int, int, int, tuple[int, ...]], ...] = (
    # count, out, in, kernel: every weight with two or more axes of the SDXL UNet (diffusers UNet2DConditionModel)
    (381, 1280, 1280, ()),
    (120, 1280, 2048, ()),
    (70, 640, 640, ()),
    (60, 10240, 1280, ()),
    (60, 1280, 5120, ()),
    (20, 640, 2048, ()),
    (10, 5120, 640, ()),
    (10, 640, 2560, ()),
    (5, 320, 1280, ()),
    (5, 640, 1280, ()),
    (1, 1280, 320, ()),  # time_embedding.linear_1
    (1, 1280, 2816, ()),  # add_embedding.linear_1
    (11, 1280, 1280, _THREE),
    (8, 640, 640, _THREE),
    (8, 320, 320, _THREE),
    (2, 1280, 2560, _THREE),
    (2, 320, 640, _THREE),
    (1, 320, 4, _THREE),  # conv_in
    (1, 4, 320, _THREE),  # conv_out
    (1, 640, 320, _THREE),
    (1, 1280, 640, _THREE),
    (1, 1280, 1920, _THREE),
    (1, 640, 1920, _THREE),
    (1, 640, 1280, _THREE),
    (1, 640, 960, _THREE),
    (1, 320, 960, _THREE),
    (2, 1280, 2560, _ONE),  # the residual blocks' shortcuts
    (2, 320, 640, _ONE),
    (1, 640, 320, _ONE),
    (1, 1280, 640, _ONE),
    (1, 1280, 1920, _ONE),
    (1, 640, 1920, _ONE),
    (1, 640, 1280, _ONE),
    (1, 640, 960, _ONE),
    (1, 320, 960, _ONE),
)


def sdxl_lokr8() -> list[WeightDescriptor]:
    """A LoKr of factor 8, full w1 and w2, over every layer of the SDXL UNet, bf16."""
    sources = ALGORITHMS["lokr8"].sources
    return [
        WeightDescriptor(out, channels, sources(out, channels, BF16), BF16, BF16, kernel, check_finite=True)
        for count, out, channels, kernel in SDXL_UNET
        for _ in range(count)
    ]


# Flux.1-dev's transformer as diffusers names it, 6 of its 19 double and 14 of its 38 single blocks: 8.04 GB of bf16.
_WIDTH = 3072
_FLUX: tuple[tuple[str, int, dict[str, tuple[int, int]]], ...] = (
    (
        "transformer_blocks",
        6,
        {
            "norm1.linear": (6 * _WIDTH, _WIDTH),
            "norm1_context.linear": (6 * _WIDTH, _WIDTH),
            **{f"attn.{name}": (_WIDTH, _WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
            **{f"attn.{name}": (_WIDTH, _WIDTH) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
            "ff.net.0.proj": (4 * _WIDTH, _WIDTH),
            "ff.net.2": (_WIDTH, 4 * _WIDTH),
            "ff_context.net.0.proj": (4 * _WIDTH, _WIDTH),
            "ff_context.net.2": (_WIDTH, 4 * _WIDTH),
        },
    ),
    (
        "single_transformer_blocks",
        14,
        {
            "norm.linear": (3 * _WIDTH, _WIDTH),
            "proj_mlp": (4 * _WIDTH, _WIDTH),
            "proj_out": (_WIDTH, 5 * _WIDTH),
            **{f"attn.{name}": (_WIDTH, _WIDTH) for name in ("to_q", "to_k", "to_v")},
        },
    ),
)


def flux_linears() -> Iterator[tuple[str, tuple[int, int]]]:
    """(module path, (out, in)) of every linear layer of the generated checkpoint."""
    for stack, count, layers in _FLUX:
        for number in range(count):
            for name, shape in layers.items():
                yield f"{stack}.{number}.{name}", shape


def flux_checkpoint() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the generated checkpoint: weights and biases."""
    found: dict[str, tuple[int, ...]] = {}
    for path, (out, channels) in flux_linears():
        found |= {f"{path}.weight": (out, channels), f"{path}.bias": (out,)}
    return found


def flux_locon(rank: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a LoCon over all of its linear layers, in diffusers' names; no alpha, so the scale is 1."""
    found: dict[str, tuple[int, ...]] = {}
    for path, (out, channels) in flux_linears():
        found |= {
            f"transformer.{path}.lora_A.weight": (rank, channels),
            f"transformer.{path}.lora_B.weight": (out, rank),
        }
    return found
