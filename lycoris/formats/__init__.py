"""What adapter files say: names, factors, scales, and the base tensors they change."""

from lycoris.formats.adapter import AdapterFile, AdapterModule, read_adapter
from lycoris.formats.base_index import Place, Rows
from lycoris.formats.describe import describe_adapter
from lycoris.formats.match import MatchedModule, Matching, match
from lycoris.formats.rows import rows_of
from lycoris.formats.shapes import delta_shape

__all__ = [
    "AdapterFile",
    "AdapterModule",
    "MatchedModule",
    "Matching",
    "Place",
    "Rows",
    "delta_shape",
    "describe_adapter",
    "match",
    "read_adapter",
    "rows_of",
]
