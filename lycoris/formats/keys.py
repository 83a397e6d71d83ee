"""Keys of adapter files: which factor a tensor is, and which algorithm a module's factors make.

Three tables say it all: `ALGORITHMS` (factor names, spelled as LyCORIS spells them in files), `SPELLINGS` (how other
writers spell the same factors) and `UNSUPPORTED` (keys of what is not merged, so that an error can name it).
Sources: LyCORIS 4.1.3 `weight_list`, PEFT 0.21.2, diffusers 0.42.1, ComfyUI `comfy/lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import product

from lycoris.errors import RefusedInput

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
DORA = "dora_scale"
SCALARS = frozenset({"alpha", "scalar", "on_input"})
"""Factors of one element, which are read at once; all others stay in the file."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A row of the table of algorithms.

    Attributes:
        name: Name users know.
        forms: Each a complete set of factors; a module holds exactly one of them.
        optional: Factors that may stand beside any form.
    """

    name: str
    forms: tuple[frozenset[str], ...]
    optional: frozenset[str]

    @property
    def factors(self) -> frozenset[str]:
        """Every factor that marks a module as this algorithm's."""
        return frozenset().union(*self.forms)


def _forms(*alternatives: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    """Sets of factors, from space-separated names: one form for every choice out of each group of alternatives."""
    return tuple(frozenset(" ".join(choice).split()) for choice in product(*alternatives))


_SCALED = frozenset({"alpha", "scalar", DORA, "diff_b"})

ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("locon", _forms((f"{UP} {DOWN}", f"{UP} {DOWN} {MID}")), _SCALED),
        Algorithm("loha", _forms(("hada_w1_a hada_w1_b hada_w2_a hada_w2_b",), ("", "hada_t1 hada_t2")), _SCALED),
        Algorithm(
            "lokr",
            _forms(
                ("lokr_w1", "lokr_w1_a lokr_w1_b"),
                ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2"),
            ),
            _SCALED,
        ),
        Algorithm("full", _forms(("diff",)), frozenset({"diff_b", "alpha"})),
        Algorithm("norm", _forms(("w_norm",)), frozenset({"b_norm", "alpha"})),
        Algorithm("ia3", _forms(("weight on_input",)), frozenset({"alpha"})),
    )
}

_SUPPORTED = ", ".join(ALGORITHMS)

_LORA_PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),  # kohya, LyCORIS
    (".lora_B.weight", ".lora_A.weight"),  # PEFT, diffusers, ai-toolkit
    (".lora_B.default.weight", ".lora_A.default.weight"),  # PEFT's state dict with the adapter's name left in
    (".lora_B", ".lora_A"),  # Mochi
    (".lora.up.weight", ".lora.down.weight"),  # diffusers until 0.24
    ("_lora.up.weight", "_lora.down.weight"),  # diffusers attention processors
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),  # diffusers text encoders
    (".lora_embedding_B", ".lora_embedding_A"),  # PEFT embeddings, whose weight is the transpose
)
PROCESSOR_PREFIX = "_lora"
EMBEDDING_PREFIX = ".lora_embedding"
MAGNITUDE_PREFIX = ".lora_magnitude_vector"

SPELLINGS: dict[str, str] = {
    **{f".{name}": name for row in ALGORITHMS.values() for name in row.factors | row.optional},
    **{spelling: name for pair in _LORA_PAIRS for spelling, name in zip(pair, (UP, DOWN), strict=True)},
    **{f"{MAGNITUDE_PREFIX}{end}": DORA for end in ("", ".weight", ".default", ".default.weight")},
}
"""End of a key, separator included -> canonical (LyCORIS) factor name."""

UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".bm.weight"), "algorithm glora"),
    **dict.fromkeys((".q_layer.weight", ".p_layer.weight", ".lambda_layer"), "algorithm tlora"),
    **dict.fromkeys((".oft_blocks", ".oft_diag"), "algorithm diag-oft"),
    ".rescale": "algorithm diag-oft or boft",
    **dict.fromkeys((".oft_R", ".oft_R.weight", ".oft_r", ".oft_s"), "algorithm oft of PEFT"),
    **dict.fromkeys((".boft_R", ".boft_s"), "algorithm boft of PEFT"),
    **dict.fromkeys((".bias_indices", ".bias_values", ".bias_size"), "a sparse bias difference of LyCORIS' extract"),
    ".ia3_l": "algorithm ia3 of PEFT",
    ".lora_E": "algorithm adalora",
    ".lora_diag": "variant KaSA of LoRA",
    **dict.fromkeys((".vera_lambda_b", ".vera_lambda_d"), "algorithm vera"),
    ".hra_u": "algorithm hra",
    ".fourierft_spectrum": "algorithm fourierft",
    ".lokr_t1": "a Tucker core for lokr_w1",
    ".set_weight": "a whole weight of ComfyUI that replaces the base's",
    ".reshape_weight": "a weight that changes its shape, of ComfyUI",
    **dict.fromkeys((".lora_B.bias", ".lora_B.default.bias"), "PEFT's lora_bias"),
    **dict.fromkeys((".trainable_tokens_delta", ".trainable_tokens_indices"), "PEFT's trainable_token_indices"),
    ".base_layer.weight": "a whole copy of an embedding, PEFT's save_embedding_layers (save with False)",
    ".bias": "a whole bias, PEFT's bias='all' or 'lora_only' or modules_to_save",
}
"""End of a key -> what it belongs to, of everything that is known and not merged."""

_ENDS = tuple(sorted({**SPELLINGS, **UNSUPPORTED}, key=len, reverse=True))
_ANY_END = re.compile("(" + "|".join(map(re.escape, _ENDS)) + ")$")


_COMMON_ENDS = frozenset({".weight", ".bias", ".base_layer.weight", ".alpha", ".scalar"})
"""Ends of keys that adapters and checkpoints both have."""

_OWN_ENDS = tuple((SPELLINGS.keys() | UNSUPPORTED.keys()) - _COMMON_ENDS)


def holds_adapter(names: Iterable[str]) -> bool:
    """Whether one of a file's keys ends as only an adapter's do, supported or not."""
    return any(name.endswith(_OWN_ENDS) for name in names)


def is_whole_weight(name: str) -> bool:
    """Whether a key is that of a layer's weight or bias, as checkpoints have them."""
    return name.endswith((".weight", ".bias")) and not name.endswith(".base_layer.weight")


@dataclass(frozen=True, slots=True)
class Key:
    """A key, taken apart: key = stem + spelling."""

    stem: str
    spelling: str

    @property
    def factor(self) -> str:
        """The factor's canonical name."""
        return SPELLINGS[self.spelling]


def parse_key(key: str, ndim: int, where: str) -> Key:
    """Take `key` apart.

    Args:
        key: As in the file's header.
        ndim: Dimensions of its tensor: four make `oft_blocks` BOFT's.
        where: The file, for messages.

    Raises:
        RefusedInput: it belongs to an algorithm that is not supported (named), or to no adapter at all.
    """
    match = _ANY_END.search(key)
    if match is None or not match.start():
        raise RefusedInput(f"{where}: key {key!r} belongs to no adapter that is known; give one of {_SUPPORTED}")
    spelling = match.group()
    if spelling in UNSUPPORTED:
        what = "algorithm boft" if spelling == ".oft_blocks" and ndim == 4 else UNSUPPORTED[spelling]
        raise RefusedInput(f"{where}: key {key!r} is of {what}, which is not supported; give one of {_SUPPORTED}")
    return Key(key[: match.start()], spelling)


def algorithm_of(names: Collection[str], where: str) -> Algorithm:
    """The algorithm that a module with the factors `names` (canonical) uses; `where` names it in messages.

    Raises:
        RefusedInput: none, or two at once, or a factor is missing or too many; the factor is named.
    """
    present = frozenset(names)
    rows = [row for row in ALGORITHMS.values() if row.factors & present]
    if len(rows) > 1:
        found = " and ".join(f"{row.name} ({', '.join(sorted(row.factors & present))})" for row in rows)
        raise RefusedInput(f"{where}: two algorithms on one module, wanted one: {found}; remove the other")
    if not rows:
        raise RefusedInput(f"{where}: only {', '.join(sorted(present))}; give the factors of one of {_SUPPORTED}")
    row = rows[0]
    own = present - row.optional
    if own == {"weight"}:
        raise RefusedInput(
            f"{where}: only 'weight': a whole weight (PEFT's modules_to_save, or a checkpoint); "
            f"give the factors of one of {_SUPPORTED}"
        )
    if own in row.forms:
        return row
    form = min(row.forms, key=lambda form: (len(form ^ own), len(own - form)))
    faults = [f"{name} is missing" for name in sorted(form - own)]
    faults += [f"{name} does not belong there" for name in sorted(own - form)]
    raise RefusedInput(
        f"{where}: {row.name} with {', '.join(sorted(own))}: {', '.join(faults)}; give the whole adapter"
    )
