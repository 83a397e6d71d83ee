"""Merge adapters into a checkpoint.

For example:

    merge(MergeOptions(base=Path("model.safetensors"), adapters=(AdapterInput(Path("style.safetensors"), 0.8),),
                       output=Path("merged.safetensors")))
"""

from lycoris.merge.options import AdapterInput, MergeOptions, MergeReport
from lycoris.merge.run import merge

__all__ = ["AdapterInput", "MergeOptions", "MergeReport", "merge"]
