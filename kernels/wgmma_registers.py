"""Warpgroup products of sm_90a with sums in register arrays, which are the left factors of further products.

    sums[64, N] (+)= left[64, 16 s] right[16 s, N]

Sums lie in a local array of N / 2 fp32 values a thread as `kernels.wgmma` says. The left factor is a tile in shared
memory or an array of 4 words for each 16 of its columns, which are two sums each: word 4 s + r of values 8 s + 2 r and
the next. The right factor is a tile in shared memory. Products are asynchronous: from their start until :func:`settle`
has waited for them none of their arrays may be touched.

A left factor in registers has to be made anew for every product: ptxas (13.0) gives one that a loop does not change the
registers of others, and loses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import barrier
from kernels import simulator_products as twins
from kernels.target import SIMULATOR, device, types
from kernels.tensor_core import HALVES_TO_F32
from kernels.warp import sync_warp
from kernels.wgmma import DEPTH, step_words


@functools.cache
def start_products(columns: int, steps: int, kind: str) -> Callable:
    """A primitive ``f(sums, a, b)``: starts ``steps`` products of 16 as a group, whose results take the sums' place.

    ``a`` and ``b`` are descriptors of K-major tiles.
    """
    step = step_words(True)
    return tile_products(columns, tuple((n * step, n * step) for n in range(steps)), kind)


@functools.cache
def tile_products(
    columns: int,
    places: tuple[tuple[int, int], ...],
    kind: str,
    k_major: tuple[bool, bool] = (True, True),
    adds: bool = False,
) -> Callable:
    """A primitive ``f(sums, a, b)``: starts products of 16 as a group, which take the sums' place or are added.

    ``a`` and ``b`` are descriptors, to which each product adds a pair of ``places``.
    """
    if SIMULATOR:
        to_f32 = HALVES_TO_F32[kind]
        return lambda sums, a, b: twins.tile_products(sums, int(a), int(b), columns, places, k_major, to_f32, adds)
    from numba.cuda.extending import intrinsic

    count = columns // 2
    first = count * (1 + adds)
    factors = [f"add.u64 a, ${first}, {left}; add.u64 b, ${first + 1}, {right};" for left, right in places]
    majors = "".join(f", {int(not major)}" for major in k_major)
    text = _products(columns, kind, factors, ["a"] * len(places), majors, adds)

    def tile_products(_context, sums, _a, _b):
        return types.void(sums, types.uint64, types.uint64), _starting(text, count, 0, adds)

    return intrinsic(tile_products)


@functools.cache
def add_products(columns: int, steps: int, kind: str, k_major: bool = False) -> Callable:
    """A primitive ``f(sums, words, b)``: starts ``steps`` products of 16 as a group, which are added to the sums.

    The left factor is an array of words, ``b`` the descriptor of a tile, MN-major or ``k_major``.
    """
    step = step_words(k_major)
    if SIMULATOR:
        to_f32 = HALVES_TO_F32[kind]
        return lambda sums, words, b: twins.add_products(sums, words, int(b), columns, steps, step, k_major, to_f32)
    from numba.cuda.extending import intrinsic

    count = columns // 2
    words = [f"{{{','.join(f'${2 * count + 4 * n + i}' for i in range(4))}}}" for n in range(steps)]
    factors = [f"add.u64 b, ${2 * count + 4 * steps}, {n * step};" for n in range(steps)]
    text = _products(columns, kind, factors, words, f", {int(not k_major)}", True)

    def add_products(_context, sums, words, _b):
        return types.void(sums, words, types.uint64), _starting(text, count, 4 * steps, True)

    return intrinsic(add_products)


def _products(columns: int, kind: str, factors: list[str], lefts: list[str], majors: str, adds: bool) -> str:
    """The instructions of a group; ``factors`` prepare the descriptors of each product."""
    registers = "{" + ",".join(f"${i}" for i in range(columns // 2)) + "}"
    lines = ["{ .reg .b64 a, b; wgmma.fence.sync.aligned;"]
    for number, (prepare, left) in enumerate(zip(factors, lefts, strict=True)):
        lines.append(
            f"{prepare} wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
            f"{registers}, {left}, b, {int(adds or number > 0)}, 1, 1{majors};"
        )
    return " ".join([*lines, "wgmma.commit_group.sync.aligned; }"])


@functools.cache
def zero_sums(count: int) -> Callable:
    """A primitive ``f(sums)``: sums of zero, in registers from here on.

    Plain zeros LLVM makes where they are first used, which may be after other products have begun; then ptxas has all
    products wait for each other.
    """
    if SIMULATOR:
        return lambda sums: sums.fill(0)
    from numba.cuda.extending import intrinsic

    text = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))

    def zero_sums(_context, sums):
        return types.void(sums), _starting(text, count, 0, False)

    return intrinsic(zero_sums)


@functools.cache
def settle(pending: int, *counts: int) -> Callable:
    """A primitive ``f(*arrays)`` that waits until at most ``pending`` groups of products are under way.

    ``arrays`` are the sums, of so many values a thread, that may be used after it.
    """
    if SIMULATOR:
        return lambda *_arrays: twins.settle(pending)
    from numba.cuda.extending import intrinsic

    text = f"wgmma.wait_group.sync.aligned {pending};"
    if len(counts) == 1:

        def settle(_context, sums):
            return types.void(sums), _settling(text, counts)

    else:

        def settle(_context, sums, others):
            return types.void(sums, others), _settling(text, counts)

    return intrinsic(settle)


def _array(context, builder, signature, arguments, number: int, count: int) -> list:
    """Pointers to the elements of a local array."""
    from llvmlite import ir

    data = context.make_array(signature.args[number])(context, builder, arguments[number]).data
    return [builder.gep(data, [ir.Constant(ir.IntType(64), i)]) for i in range(count)]


def _starting(text: str, count: int, word_count: int, adds: bool) -> Callable:
    """Code of a primitive of sums, perhaps words, and descriptors."""
    from llvmlite import ir

    def generate(context, builder, signature, arguments):
        places = _array(context, builder, signature, arguments, 0, count)
        old = [builder.load(place) for place in places] if adds else []
        words, descriptors = [], arguments[1:]
        if word_count:
            words = [builder.load(place) for place in _array(context, builder, signature, arguments, 1, word_count)]
            descriptors = arguments[2:]
        operands = [*old, *words, *descriptors]
        function = ir.FunctionType(ir.LiteralStructType([ir.FloatType()] * count), [value.type for value in operands])
        ties = [str(i) for i in range(len(old))]
        kinds = ["r"] * len(words) + ["l"] * len(descriptors)
        constraints = ",".join(["=f"] * count + ties + kinds + ["~{memory}"])
        assembly = ir.InlineAsm(function, text, constraints, side_effect=True)
        found = builder.call(assembly, operands, attrs=("convergent",))
        for i, place in enumerate(places):
            builder.store(builder.extract_value(found, i), place)
        return context.get_dummy_value()

    return generate


def _settling(text: str, counts: tuple[int, ...]) -> Callable:
    from llvmlite import ir

    def generate(context, builder, signature, arguments):
        places = [p for i, n in enumerate(counts) for p in _array(context, builder, signature, arguments, i, n)]
        kinds = [ir.FloatType()] * len(places)
        function = ir.FunctionType(ir.LiteralStructType(kinds), kinds)
        ties = [str(i) for i in range(len(places))]
        constraints = ",".join(["=f"] * len(places) + ties + ["~{memory}"])
        assembly = ir.InlineAsm(function, text, constraints, side_effect=True)
        found = builder.call(assembly, [builder.load(place) for place in places], attrs=("convergent",))
        for i, place in enumerate(places):
            builder.store(builder.extract_value(found, i), place)
        return context.get_dummy_value()

    return generate


@device
def store_lines(slot, words, lane):
    """A warp's 16 lines of 64 halves, as they leave a product, to shared memory for TMA, swizzled by 128 bytes.

    The warp may then have one of its threads send them.
    """
    line = np.uint32((lane & np.uint32(7)) + np.uint32(np.uint32(lane >> np.uint32(3)) & np.uint32(1)) * np.uint32(8))
    for step in range(DEPTH // 16):
        piece = np.uint32(np.uint32(2 * step) + (lane >> np.uint32(4)))
        place = np.uint32(slot + line * np.uint32(2 * DEPTH) + ((piece ^ (line & np.uint32(7))) << np.uint32(4)))
        barrier.store_matrix(place, words[4 * step], words[4 * step + 1], words[4 * step + 2], words[4 * step + 3])
    barrier.shared_visible_to_tma()
    sync_warp()
