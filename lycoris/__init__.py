"""LyCORIS adapters (LoCon, LoHa, LoKr and their kin) on Numba-CUDA kernels.

`lycoris.merge` merges adapters into a checkpoint, `lycoris.formats` reads adapter files, `lycoris.checkpoint`
streams safetensors, `lycoris.algorithms` holds the adapters as modules. Importing this package loads none of them,
and nothing of CUDA.
"""

from lycoris.errors import LycorisError, MergeFailed, RefusedInput

__all__ = ["LycorisError", "MergeFailed", "RefusedInput", "__version__"]
__version__ = "0.1.0"
