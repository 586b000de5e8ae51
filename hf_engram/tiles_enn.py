"""Small matrix products inside compiled loops, at the speed of a library's large ones.

A recurrence multiplies a few rows by the same weights at every step: too little work for a call into a BLAS, which
would pack the weights each time. Here they are packed once, and `multiply_add` goes over the product in tiles whose
sums stay in vector registers, as in Goto and van de Geijn, *Anatomy of High-Performance Matrix Multiplication* (ACM
TOMS 34, 2008). Matrices are padded with zeros to whole tiles.
"""

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .numba_enn import compiled_apart, compiled_inside

try:
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))
except ImportError:  # the loops are not called then (`dispatch_enn.use_compiled`)
    AVX512 = False

    def intrinsic(function: Any) -> Any:
        """Stand-in for numba's decorator."""
        return function


TILE_ROWS = 4
TILE_WIDTH = 32 if AVX512 else 16  # two vectors of float32: with 4 rows, enough sums to keep both pipelines busy


def pack(weight: Tensor) -> Tensor:
    """`weight` `[K, J]` in panels `[ceil(J / TILE_WIDTH), K, TILE_WIDTH]`, the last one filled up with zeros."""
    depth, width = weight.shape
    padded = F.pad(weight, (0, -width % TILE_WIDTH))
    return padded.view(depth, -1, TILE_WIDTH).transpose(0, 1).contiguous()


@compiled_inside
def whole_tiles(size):
    """`size`, rounded up to whole tiles."""
    return (size + TILE_WIDTH - 1) // TILE_WIDTH * TILE_WIDTH


@compiled_inside
def zeros(rows, columns, like):
    """A matrix of zeros in the dtype of the array `like`."""
    matrix = np.empty((rows, columns), like.dtype)
    clear(matrix, 0)
    return matrix


@compiled_apart
def clear(matrix, first):
    """Set the rows of `matrix` from `first` on to zero."""
    for r in range(first, matrix.shape[0]):
        for n in range(matrix.shape[1]):
            matrix[r, n] = 0


@compiled_apart
def copy_into(padded, matrix, begin, end):
    """Copy the rows `begin` to `end` of `matrix` to the top left of `padded`, and clear the rows below."""
    for r in range(end - begin):
        for n in range(matrix.shape[1]):
            padded[r, n] = matrix[begin + r, n]
    clear(padded, end - begin)


@compiled_apart
def copy_out(target, begin, end, padded):
    """Copy the top left of `padded` to the rows `begin` to `end` of `target`."""
    for t in range(end - begin):
        for h in range(target.shape[1]):
            target[begin + t, h] = padded[t, h]


@compiled_apart
def pack_rows(matrix, depth):
    """The first `depth` rows of `matrix`, whose rows are whole tiles, as `pack` packs them."""
    panels = np.empty((matrix.shape[1] // TILE_WIDTH, depth, TILE_WIDTH), matrix.dtype)
    for p in range(panels.shape[0]):
        for k in range(depth):
            for j in range(TILE_WIDTH):
                panels[p, k, j] = matrix[k, p * TILE_WIDTH + j]
    return panels


@compiled_apart
def pack_columns(matrix, depth):
    """The first `depth` columns of `matrix`, whose columns are whole tiles, as `pack` packs the transpose."""
    panels = np.empty((matrix.shape[0] // TILE_WIDTH, depth, TILE_WIDTH), matrix.dtype)
    for p in range(panels.shape[0]):
        for k in range(depth):
            for j in range(TILE_WIDTH):
                panels[p, k, j] = matrix[p * TILE_WIDTH + j, k]
    return panels


@compiled_apart
def multiply_add(total, rows, panels):
    """`total += rows @ weight`, with `weight` `[K, J]` packed into `panels`.

    `rows` is `[R, K or wider]`, `total` `[R, J rounded up to whole tiles, or wider]`.
    """
    together = total.shape[0] // TILE_ROWS * TILE_ROWS
    for p in range(panels.shape[0]):
        for r in range(0, together, TILE_ROWS):
            multiply_add_tile(total, rows, panels, r, p)
        for r in range(together, total.shape[0]):
            multiply_add_row(total, rows, panels, r, p)


def tile(count: int, strands: int) -> Any:
    """`multiply_add` for `count` rows from `row` on and one panel, in LLVM's vectors, to keep its sums in registers.

    Every row has `strands` sums, over as many interleaved parts of K, since a sum must wait for its last addition.
    """

    @intrinsic
    def multiply_add_rows(context: Any, total: Any, rows: Any, panels: Any, row: Any, panel: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: tuple) -> Any:
            kinds, (row, panel) = signature.args[:3], arguments[3:]
            total, rows, panels = (
                context.make_array(kind)(context, builder, value)
                for kind, value in zip(kinds, arguments[:3], strict=True)
            )
            scalar, itemsize = context.get_data_type(kinds[0].dtype), kinds[0].dtype.bitwidth // 8
            vector = ir.VectorType(scalar, TILE_WIDTH)
            nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), TILE_WIDTH), [0] * TILE_WIDTH)

            def address(array: Any, index: Any, kind: Any) -> Any:
                start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
                offset = builder.mul(builder.extract_value(array.strides, 0), index)
                return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())

            indices = [builder.add(row, ir.Constant(row.type, r)) for r in range(count)]
            targets = [builder.gep(address(total, index, vector), [panel]) for index in indices]
            sources = [address(rows, index, scalar) for index in indices]
            weights = address(panels, panel, vector)
            zero = ir.Constant(vector, [ir.Constant(scalar, 0.0)] * TILE_WIDTH)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(strands)] for _ in range(count)]

            def add_product(k: Any, strand: int) -> None:
                weight = builder.load(builder.gep(weights, [k]), align=itemsize)
                for source, partial in zip(sources, sums, strict=True):
                    value = builder.insert_element(nothing, builder.load(builder.gep(source, [k])), first)
                    value = builder.shuffle_vector(value, nothing, everywhere)
                    product = builder.fmul(value, weight, flags=("contract",))
                    added = builder.fadd(product, builder.load(partial[strand]), flags=("contract",))
                    builder.store(added, partial[strand])

            depth = builder.extract_value(panels.shape, 1)
            one, step = ir.Constant(depth.type, 1), ir.Constant(depth.type, strands)
            whole = builder.mul(builder.sdiv(depth, step), step)
            with cgutils.for_range_slice(builder, ir.Constant(depth.type, 0), whole, step) as (k, _):
                for strand in range(strands):
                    add_product(builder.add(k, ir.Constant(depth.type, strand)), strand)
            with cgutils.for_range_slice(builder, whole, depth, one) as (k, _):
                add_product(k, 0)
            for target, partials in zip(targets, sums, strict=True):
                result = builder.load(target, align=itemsize)
                for partial in partials:
                    result = builder.fadd(result, builder.load(partial))
                builder.store(result, target, align=itemsize)
            return context.get_dummy_value()

        return types.void(total, rows, panels, row, panel), generate

    return multiply_add_rows


multiply_add_tile, multiply_add_row = tile(TILE_ROWS, 1), tile(1, 4)
