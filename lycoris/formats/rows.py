"""Some rows of a module's delta as a module of its own, where rows of its factors make them."""

from __future__ import annotations

from dataclasses import replace

from lycoris.checkpoint import TensorEntry
from lycoris.formats.adapter import AdapterModule
from lycoris.formats.keys import UP

ROW_FACTORS: dict[str, tuple[str, ...]] = {
    "locon": (UP,),
    "loha": ("hada_w1_a", "hada_w2_a"),
    "lokr": ("lokr_w1", "lokr_w1_a"),
    "full": ("diff",),
    "norm": ("w_norm",),
    "ia3": ("weight",),
}
"""Algorithm -> the factors whose rows make the delta's: one each, or with LoKr as many as w2 has."""

UNCUT = frozenset({"hada_t1"})
"""With one of these factors, rows of the delta are columns of the others."""


def rows_of(module: AdapterModule, first: int, count: int, *, bias: bool = False) -> AdapterModule | None:
    """What of `module` makes rows [first, first + count) of its delta, or of its bias difference alone.

    None where no rows of its factors make them: Tucker LoHa, and LoKr between the rows of w1.
    """
    factors = dict(module.factors)
    if bias:
        names = [name for name, entry in factors.items() if entry is module.bias]
    elif UNCUT & factors.keys():
        return None
    else:
        names = [name for name in ROW_FACTORS[module.algorithm] if name in factors and not module.on_input]
    rows = module.bias.count if bias else module.delta_shape[0]
    for name in names if rows else ():
        height = rows // factors[name].shape[0]
        if first % height or count % height:
            return None
        factors[name] = _band(factors[name], first // height, count // height)
    return replace(module, factors=factors)


def _band(entry: TensorEntry, first: int, count: int) -> TensorEntry:
    """Rows [first, first + count) of a tensor, which lie together in its file."""
    row = entry.nbytes // entry.shape[0]
    return replace(entry, shape=(count, *entry.shape[1:]), start=entry.start + first * row, nbytes=count * row)
