"""Warpgroup products of sm_90a: wgmma m64nNk16, both operands in shared memory, sums in registers.

The sums of a warpgroup's 64 x N tile are a tuple of N / 2 fp32 values a thread. In warp w of the group, lane
4 g + t, value 4 j + i is row 16 w + g + 8 (i >> 1), column 8 j + 2 t + (i & 1). Operand tiles are 64 deep with
128-byte swizzle, as TMA writes them, at multiples of 1024 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import simulator_hopper as twins
from kernels.target import SIMULATOR, device, types
from kernels.tensor_core import HALVES_TO_F32

DEPTH = 64
"""Values of K in a shared-memory tile: 128 bytes, the swizzle's width."""

STEPS = DEPTH // 16
"""Instructions to go through it."""

_SWIZZLE = {128: 1 << 62, 64: 2 << 62, 32: 3 << 62}
# Encoded (16-byte) distances. K-major: 8 rows of 128 bytes are an atom, a step of 16 values is 32 bytes along the row.
_K_MAJOR = (_SWIZZLE[128] | (1024 >> 4) << 32 | 1 << 16, 2)


def _mn_major(span: int) -> tuple[int, int]:
    """An atom is 8 lines of ``span`` bytes of M or N, a step two atoms; the next values of M or N are 64 lines away."""
    atom = 8 * span >> 4
    return _SWIZZLE[span] | atom << 32 | DEPTH * span >> 4 << 16, 2 * atom


# In a block of a cluster a shared address has the block's rank above these bits, which a descriptor has no room for.
_ADDRESS = (1 << 18) - 1
_u32 = np.uint32


@functools.cache
def operand_descriptor(k_major: bool, span: int = 128) -> Callable:
    """A device function: the descriptor, uint64, of an operand at a shared address.

    Lines of an MN-major one may be narrower than 128 bytes, ``span`` of 64 or 32, and are swizzled by that.
    """
    constant = np.uint64((_K_MAJOR if k_major else _mn_major(span))[0])

    @device
    def describe(address):
        return np.uint64(np.uint64(_u32(address & _u32(_ADDRESS)) >> _u32(4)) | constant)

    return describe


def step_words(k_major: bool, span: int = 128) -> int:
    """What 16 further values of K add to a descriptor."""
    return (_K_MAJOR if k_major else _mn_major(span))[1]


def _accumulators(columns: int) -> types.Type:
    return types.UniTuple(types.float32, columns // 2)


def _emit(text: str, columns: int, extra: str, code: Callable) -> Callable:
    """An intrinsic over the accumulators, tied in and out, and further 64-bit operands, an "l" each."""
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    count, tuple_type = columns // 2, _accumulators(columns)

    def generate(context, builder, signature, arguments):
        sums = [builder.extract_value(arguments[0], i) for i in range(count)]
        operands = [ir.FloatType()] * count + [ir.IntType(64)] * len(extra)
        function = ir.FunctionType(ir.LiteralStructType([ir.FloatType()] * count), operands)
        constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + list(extra) + ["~{memory}"])
        assembly = ir.InlineAsm(function, text, constraints, side_effect=True)
        result = builder.call(assembly, [*sums, *arguments[1:]], attrs=("convergent",))
        return context.make_tuple(builder, tuple_type, [builder.extract_value(result, i) for i in range(count)])

    signature = tuple_type(tuple_type, *[types.uint64] * len(extra))
    return intrinsic(code(signature, generate))


@functools.cache
def zero_sums(columns: int) -> Callable:
    """A primitive: accumulators of zero."""
    if SIMULATOR:
        return lambda: twins.Sums(np.zeros((64, columns), np.float32))
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    tuple_type = _accumulators(columns)

    def zero_sums(_context):
        def generate(context, builder, _signature, _arguments):
            return context.make_tuple(builder, tuple_type, [ir.Constant(ir.FloatType(), 0.0)] * (columns // 2))

        return tuple_type(), generate

    return intrinsic(zero_sums)


@functools.cache
def multiply_add(columns: int, steps: int, a_k_major: bool, b_k_major: bool, kind: str, b_span: int = 128) -> Callable:
    """A primitive ``sums = f(sums, a, b)``: issues ``steps`` products of 16 and commits them as a group.

    ``a`` and ``b`` are descriptors. The sums may be used after :func:`wait_products`.
    """
    step_a, step_b = step_words(a_k_major), step_words(b_k_major, b_span)
    if SIMULATOR:

        def multiply_twin(sums, a, b):
            group = twins.Products(int(a), int(b), steps, step_a, step_b, a_k_major, b_k_major, HALVES_TO_F32[kind])
            return twins.Sums(sums.matrix, (*sums.pending, group))

        return multiply_twin
    text = _products(columns, steps, (a_k_major, b_k_major), (step_a, step_b), kind, 2 * (columns // 2))

    def code(signature, generate):
        def multiply_add(_context, _sums, _a, _b):
            return signature, generate

        return multiply_add

    return _emit(text + " }", columns, "ll", code)


def _products(
    columns: int, steps: int, majors: tuple[bool, bool], words: tuple[int, int], kind: str, operand: int,
    adds: bool = True,
) -> str:  # fmt: skip
    """The instructions of a group of products up to its commit; ``operand`` is the number of A's descriptor."""
    registers = "{" + ",".join(f"${i}" for i in range(columns // 2)) + "}"
    lines = ["{ .reg .b64 a, b; wgmma.fence.sync.aligned;"]
    for step in range(steps):
        lines.append(f"add.u64 a, ${operand}, {step * words[0]};")
        lines.append(f"add.u64 b, ${operand + 1}, {step * words[1]};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {registers}, a, b, "
            f"{int(adds or step > 0)}, 1, 1, {int(not majors[0])}, {int(not majors[1])};"
        )
    return " ".join([*lines, "wgmma.commit_group.sync.aligned;"])


@functools.cache
def product(columns: int, steps: int, kind: str) -> Callable:
    """A primitive ``sums = f(a, b)``: ``steps`` products of K-major operands, waited for."""
    if SIMULATOR:
        zero, multiply = zero_sums(columns), multiply_add(columns, steps, True, True, kind)
        return lambda a, b: twins.wait_products(multiply(zero(), a, b), 0)
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    count, tuple_type = columns // 2, _accumulators(columns)
    text = (
        _products(columns, steps, (True, True), (step_words(True),) * 2, kind, count, adds=False)
        + " wgmma.wait_group.sync.aligned 0; }"
    )

    def product(_context, _a, _b):
        def generate(context, builder, _signature, arguments):
            function = ir.FunctionType(ir.LiteralStructType([ir.FloatType()] * count), [ir.IntType(64)] * 2)
            constraints = ",".join(["=f"] * count + ["l", "l", "~{memory}"])
            assembly = ir.InlineAsm(function, text, constraints, side_effect=True)
            result = builder.call(assembly, arguments, attrs=("convergent",))
            return context.make_tuple(builder, tuple_type, [builder.extract_value(result, i) for i in range(count)])

        return tuple_type(types.uint64, types.uint64), generate

    return intrinsic(product)


@functools.cache
def wait_products(columns: int, pending: int) -> Callable:
    """A primitive ``sums = f(sums)`` that waits until at most ``pending`` groups of products are under way."""
    if SIMULATOR:
        return lambda sums: twins.wait_products(sums, pending)

    def code(signature, generate):
        def wait_products(_context, _sums):
            return signature, generate

        return wait_products

    return _emit(f"wgmma.wait_group.sync.aligned {pending};", columns, "", code)


@functools.cache
def part_of_sums(columns: int, first: int, count: int) -> Callable:
    """A primitive: ``count`` of the sums from ``first`` on, as a tuple."""
    if SIMULATOR:
        return lambda sums: twins.part_of_sums(sums, first, count)
    from numba.cuda.extending import intrinsic

    tuple_type = types.UniTuple(types.float32, count)

    def part_of_sums(_context, _sums):
        def generate(context, builder, _signature, arguments):
            taken = [builder.extract_value(arguments[0], first + i) for i in range(count)]
            return context.make_tuple(builder, tuple_type, taken)

        return tuple_type(_accumulators(columns)), generate

    return intrinsic(part_of_sums)


@functools.cache
def scaled_sums(columns: int) -> Callable:
    """A primitive ``sums = f(sums, factor)``: every sum times a factor; no products may be under way."""
    if SIMULATOR:
        return twins.scaled_sums
    from numba.cuda.extending import intrinsic

    tuple_type = _accumulators(columns)

    def scaled_sums(_context, _sums, _factor):
        def generate(context, builder, _signature, arguments):
            old = [builder.extract_value(arguments[0], i) for i in range(columns // 2)]
            return context.make_tuple(builder, tuple_type, [builder.fmul(value, arguments[1]) for value in old])

        return tuple_type(tuple_type, types.float32), generate

    return intrinsic(scaled_sums)


@functools.cache
def added_sums(columns: int, first: int, count: int) -> Callable:
    """A primitive ``sums = f(sums, others)``: the sums of ``count`` columns added to those from ``first`` on.

    No products may be under way. Products that are narrower than the sums go to sums of their own: where two widths
    share registers, ptxas makes all products of a kernel wait for each other.
    """
    if SIMULATOR:
        return lambda sums, others: twins.added_sums(sums, others, first)
    from numba.cuda.extending import intrinsic

    tuple_type, place = _accumulators(columns), range(first // 2, (first + count) // 2)

    def added_sums(_context, _sums, _others):
        def generate(context, builder, _signature, arguments):
            values = [builder.extract_value(arguments[0], i) for i in range(columns // 2)]
            for number, i in enumerate(place):
                values[i] = builder.fadd(values[i], builder.extract_value(arguments[1], number))
            return context.make_tuple(builder, tuple_type, values)

        return tuple_type(tuple_type, _accumulators(count)), generate

    return intrinsic(added_sums)


@functools.cache
def multiply_held(columns: int, products: tuple[tuple[tuple[int, int], ...], ...], kinds: tuple[str, ...]) -> Callable:
    """A primitive ``f(held, results, b)``: each of ``results`` = a sum of products of 16, all waited for together.

    Of a product's pairs the first number says where A's fragment begins in the local array ``held``, four words as
    mma.sync takes them; B is MN-major, at the product's descriptor in ``b`` + the second. The results' instructions
    take turns, so that none waits for the one before. Results are ordered by rows: first all of row g of the warp's
    16, then those of row g + 8.
    """
    if SIMULATOR:
        to_f32 = [HALVES_TO_F32[kind] for kind in kinds]
        return lambda held, results, b: twins.multiply_held(held, results, b, columns, products, to_f32)
    from numba.cuda.extending import intrinsic

    text = _held_products(columns, products, kinds)

    def multiply_held(_context, held, results, b):
        return types.void(held, results, b), _held_code(columns, products, text)

    return intrinsic(multiply_held)


def _held_products(columns: int, products: tuple, kinds: tuple[str, ...]) -> str:
    sums, count = columns // 2, len(products)
    first_word = sums * count
    first_descriptor = first_word + 4 * sum(map(len, products))
    starts = [first_word + 4 * sum(map(len, products[:i])) for i in range(count)]
    lines = ["{ .reg .b64 b; wgmma.fence.sync.aligned;"]
    for turn in range(max(map(len, products))):
        for i, (pairs, kind) in enumerate(zip(products, kinds, strict=True)):
            if turn < len(pairs):
                registers = ",".join(f"${sums * i + j}" for j in range(sums))
                words = ",".join(f"${starts[i] + 4 * turn + j}" for j in range(4))
                lines.append(
                    f"add.u64 b, ${first_descriptor + i}, {pairs[turn][1]}; wgmma.mma_async.sync.aligned"
                    f".m64n{columns}k16.f32.{kind}.{kind} {{{registers}}}, {{{words}}}, b, {int(turn > 0)}, 1, 1, 1;"
                )
    return " ".join([*lines, "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"])


def _held_code(columns: int, products: tuple, text: str) -> Callable:
    from llvmlite import ir

    sums, word, wide = columns // 2, ir.IntType(32), ir.IntType(64)

    def generate(context, builder, signature, arguments):
        def element(array_type, array, index: int) -> ir.Value:
            return builder.gep(context.make_array(array_type)(context, builder, array).data, [ir.Constant(wide, index)])

        held, results, descriptors = arguments
        words = [
            builder.load(element(signature.args[0], held, first + i))
            for pairs in products
            for first, _ in pairs
            for i in range(4)
        ]
        given = [builder.extract_value(descriptors, i) for i in range(len(products))]
        total = sums * len(products)
        function = ir.FunctionType(
            ir.LiteralStructType([ir.FloatType()] * total), [word] * len(words) + [wide] * len(given)
        )
        constraints = ",".join(["=&f"] * total + ["r"] * len(words) + ["l"] * len(given) + ["~{memory}"])
        assembly = ir.InlineAsm(function, text, constraints, side_effect=True)
        found = builder.call(assembly, [*words, *given], attrs=("convergent",))
        for i in range(total):
            place = 2 * (i % sums // 4) + (i & 1) + (sums // 2) * (i >> 1 & 1)
            result = builder.extract_value(results, i // sums)
            target = element(signature.args[1].types[i // sums], result, place)
            builder.store(builder.extract_value(found, i), target)
        return context.get_dummy_value()

    return generate
