"""The wgmma SKU of the weight family (sm_90a): tiles whose products are large, multiplied by warpgroups."""

from __future__ import annotations

import functools

from kernels.weight.tile_sources import products
from plans.core.plan import Sku
from plans.core.sku import ArchSku, BackendKind
from plans.weight import tile as tiles
from plans.weight.descriptor import WeightDescriptor
from plans.weight.program import prepared_bytes

LEAST_PRODUCTS, LEAST_PRODUCTS_ALONE = 4, 2
"""Products of 16 ranks for each group from which reading right factors once for four warps pays: where a base is read,
and for a delta alone."""
_SOURCES = ("low_rank", "hadamard")


def refuses(descriptor: WeightDescriptor) -> str:
    """Why warpgroups cannot compute a descriptor, or ""."""
    if reason := tiles.refuses(descriptor):
        return reason
    if descriptor.is_dora:
        return "DoRA is computed by the cluster and mma SKUs"
    if tiles.settles(descriptor):
        return "settled merges are computed by the mma SKU"
    sources = tiles.tile_sources(descriptor)
    if others := sorted({source[0] for source in sources}.difference(_SOURCES)):
        return f"wants low-rank products and products of two, found {', '.join(others)}"
    if not all(product.held_words for source in sources for product in products(source)):
        return "wants left factors that registers hold"
    if tiles.tile_of(descriptor, wgmma=True) is None:
        return f"64 columns of the right factors need more than {tiles.MAX_SHARED_BYTES} bytes of shared memory"
    return ""


def suits(descriptor: WeightDescriptor) -> bool:
    """Whether the products are large enough."""
    found = (product for source in tiles.tile_sources(descriptor) for product in products(source))
    least = LEAST_PRODUCTS_ALONE if descriptor.base is None else LEAST_PRODUCTS
    return sum(product.steps * product.pairs for product in found) >= least


class WgmmaProgram(tiles.TileProgram):
    """One launch."""

    wgmma = True


WGMMA = Sku(
    name="wgmma",
    backend=BackendKind.WGMMA,
    arch=ArchSku.SM90A,
    refuses=refuses,
    guarantee=tiles.tensor_core_guarantee,
    build=WgmmaProgram,
    workspace=functools.partial(prepared_bytes, fused_second_half=True),
    alignment=16,
    suits=suits,
)
