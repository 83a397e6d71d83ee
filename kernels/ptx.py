"""One way to make an inline-PTX primitive, with its simulator twin.

    load = instruction("ld.global.v4.u32 {{$0,$1,$2,$3}}, [$4];", takes=(GLOBAL,), gives="rrrr", twin=...)

Operands are letters as in PTX constraints (``h`` u16, ``r`` u32, ``l`` u64, ``f`` fp32) or an address:
``GLOBAL`` and ``SHARED`` each take two arguments, a pointer or shared array and an element index, and give the
instruction one address. On a GPU the result is a Numba intrinsic; in the simulator it is the twin, called with
the same arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from kernels.target import SIMULATOR, types

GLOBAL, SHARED = "global", "shared"

_NUMBA_TYPE = {"h": types.uint16, "r": types.uint32, "l": types.uint64, "f": types.float32}


def instruction(
    template: str,
    takes: str | tuple[str, ...],
    gives: str = "",
    *,
    twin: Callable,
    pure: bool = False,
) -> Callable:
    """A primitive from a PTX template; several results come as a tuple, none as nothing.

    ``pure`` instructions depend on their operands only and may be moved or merged; all others are volatile
    and order memory.
    """
    return twin if SIMULATOR else _intrinsic(template, tuple(takes), gives, pure, twin.__name__)


def _intrinsic(template: str, takes: tuple[str, ...], gives: str, pure: bool, name: str) -> Callable:
    from numba.cuda.extending import intrinsic

    names = ["typingctx"]
    for i, kind in enumerate(takes):
        names += [f"base{i}", f"index{i}"] if kind in (GLOBAL, SHARED) else [f"operand{i}"]

    def typing(_context, *arguments):
        wanted, rest = [], list(arguments)
        for kind in takes:
            if kind in (GLOBAL, SHARED):
                wanted += [rest.pop(0), types.int64]
                rest.pop(0)
            else:
                wanted.append(_NUMBA_TYPE[kind])
                rest.pop(0)
        return _result_type(gives)(*wanted), _code_generator(template, takes, gives, pure)

    typing.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    )
    typing.__name__ = typing.__qualname__ = name
    return intrinsic(typing)


def _result_type(gives: str) -> types.Type:
    if not gives:
        return types.void
    if len(gives) == 1:
        return _NUMBA_TYPE[gives]
    return types.UniTuple(_NUMBA_TYPE[gives[0]], len(gives))


def _code_generator(template: str, takes: tuple[str, ...], gives: str, pure: bool) -> Callable:
    from llvmlite import ir

    llvm = {"h": ir.IntType(16), "r": ir.IntType(32), "l": ir.IntType(64), "f": ir.FloatType()}

    def address(context, builder, kind, base_type, base, index):
        if kind == GLOBAL:
            return builder.ptrtoint(builder.gep(base, [index]), llvm["l"])
        data = context.make_array(base_type)(context, builder, base).data
        pointer = builder.gep(data, [index])
        in_shared = builder.addrspacecast(pointer, pointer.type.pointee.as_pointer(3))
        return builder.ptrtoint(in_shared, llvm["r"])

    def generate(context, builder, signature, arguments):
        values, constraints, i = [], [f"={kind}" for kind in gives], 0
        for kind in takes:
            if kind in (GLOBAL, SHARED):
                values.append(address(context, builder, kind, signature.args[i], arguments[i], arguments[i + 1]))
                constraints.append("l" if kind == GLOBAL else "r")
                i += 2
            else:
                values.append(arguments[i])
                constraints.append(kind)
                i += 1
        if not pure:
            constraints.append("~{memory}")
        if len(gives) > 1:
            returned = ir.LiteralStructType([llvm[kind] for kind in gives])
        else:
            returned = llvm[gives] if gives else ir.VoidType()
        function = ir.FunctionType(returned, [value.type for value in values])
        # Without `convergent` LLVM may sink or duplicate a warp operation into a branch that some lanes skip.
        result = builder.call(
            ir.InlineAsm(function, template, ",".join(constraints), side_effect=not pure),
            values,
            attrs=("convergent",) if ".sync" in template or ".aligned" in template else (),
        )
        if not gives:
            return context.get_dummy_value()
        if len(gives) == 1:
            return result
        return context.make_tuple(
            builder, signature.return_type, [builder.extract_value(result, j) for j in range(len(gives))]
        )

    return generate
