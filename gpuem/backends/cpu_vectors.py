"""The innermost steps of the kernels in vector registers of LANES neighbouring pixels.

Written in LLVM's own vectors because its loop vectoriser gives up on so many arrays: it would have to prove at run time
that none of them overlap, row by row. The vectors are of no particular processor; LLVM turns them into AVX2, AVX-512
or NEON instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic

cgutils: Any = numba_cgutils
LANES = 16
# distance between accumulators; not a power of two, so that their addresses don't collide in the first-level cache
PITCH = 256 + 16


def _intrinsic(build: Callable[..., Any]) -> Any:
    """Let compiled code use the instructions that `build` writes; whole numbers known beforehand stay known."""
    return intrinsic(prefer_literal=True)(build)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Address of LANES elements from `index`, and the alignment of one."""
    data = context.make_array(kind)(context, builder, value=array).data
    element = data.type.pointee
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, LANES).as_pointer())


def _load(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.load(_pointer(context, builder, kind, array, index), align=kind.dtype.bitwidth // 8)


def _store(context: Any, builder: Any, kind: Any, array: Any, index: Any, value: Any) -> None:
    builder.store(value, _pointer(context, builder, kind, array, index), align=kind.dtype.bitwidth // 8)


@_intrinsic
def fetch(typing: Any, pixels: Any, start: Any, count: Any) -> Any:
    """Ask for `count` pixels from position `start`, line after line, before they are needed.

    The hardware follows one stream of ascending lines well, and sixteen (four rows of four frames) badly.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_pixels, v_start, v_count = args
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, value=v_pixels).data
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        call = ir.FunctionType(ir.VoidType(), (byte, flag, flag, flag))
        function = cgutils.get_or_insert_function(builder.module, call, "llvm.prefetch.p0")
        arguments = [ir.Constant(flag, value) for value in (0, 3, 1)]
        line = ir.Constant(v_start.type, 64 // (kind.dtype.bitwidth // 8))
        end = builder.add(v_start, v_count)
        with cgutils.for_range_slice(builder, v_start, end, line, v_start.type) as (index, _):
            builder.call(function, [builder.bitcast(builder.gep(data, [index]), byte), *arguments])
        return context.get_dummy_value()

    return types.void(pixels, start, count), build


def _widen(builder: Any, value: Any, source: Any, target: Any) -> Any:
    """Pixels in the type of the accumulators."""
    wide = ir.VectorType(ir.DoubleType() if isinstance(target, types.Float) else ir.IntType(target.bitwidth), LANES)
    if value.type == wide:
        return value
    if isinstance(target, types.Float):
        return builder.fpext(value, wide)
    return builder.sext(value, wide) if source.signed else builder.zext(value, wide)


def _larger(builder: Any, a: Any, b: Any, kind: Any) -> Any:
    if isinstance(kind, types.Float):
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)
    compare = builder.icmp_signed if kind.signed else builder.icmp_unsigned
    return builder.select(compare(">", a, b), a, b)


def _add_lanes(builder: Any, value: Any, add: Any) -> Any:
    """Sum of all lanes, halves first: four steps instead of sixteen."""
    count = LANES
    while count > 1:
        count //= 2
        nothing = ir.Constant(value.type, ir.Undefined)
        halves = [
            builder.shuffle_vector(
                value, nothing, ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(low, low + count)))
            )
            for low in (0, count)
        ]
        value = add(*halves)
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))


@_intrinsic
def accumulate4(
    typing: Any, pixels: Any, places: Any, width: Any, rows: Any, total: Any, maximum: Any, columns: Any
) -> Any:
    """Add LANES pixels in each of `rows` rows of four frames to every accumulator that isn't None.

    `places` are the positions in `pixels`, one per frame, the one in `total` and `maximum`, and the column x; the next
    row is `width` further. In `columns`, the sum of frame f goes to f * PITCH + x, and its running sum over rows to
    (4 + f) * PITCH + x. `rows` is a number known beforehand: what several rows add to stays in registers.
    """
    count = rows.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_pixels, v_places, v_width, _, v_total, v_maximum, v_columns = args
        v_where, v_x = (builder.extract_value(v_places, k) for k in (4, 5))
        k_pixels, _, _, _, k_total, k_maximum, k_columns = signature.args
        source = k_pixels.dtype
        add = builder.fadd if isinstance(source, types.Float) else builder.add
        below = [builder.mul(v_width, ir.Constant(v_width.type, r)) for r in range(count)]
        images = [builder.add(v_where, down) for down in below]
        has_total, has_maximum, has_columns = (
            not isinstance(k, types.NoneType) for k in (k_total, k_maximum, k_columns)
        )
        totals = [_load(context, builder, k_total, v_total, p) for p in images] if has_total else []
        largest = [_load(context, builder, k_maximum, v_maximum, p) for p in images] if has_maximum else []
        for f in range(4):
            start = builder.extract_value(v_places, f)
            if has_columns:
                once = builder.add(v_x, ir.Constant(v_x.type, f * PITCH))
                twice = builder.add(v_x, ir.Constant(v_x.type, (4 + f) * PITCH))
                column = _load(context, builder, k_columns, v_columns, once)
                running = _load(context, builder, k_columns, v_columns, twice)
            for r in range(count):
                place = builder.add(start, below[r])
                value = _load(context, builder, k_pixels, v_pixels, place)
                if has_maximum:
                    largest[r] = _larger(builder, value, largest[r], source)
                if has_total:
                    totals[r] = add(totals[r], _widen(builder, value, source, k_total.dtype))
                if has_columns:
                    column = add(column, _widen(builder, value, source, k_columns.dtype))
                    running = add(running, column)
            if has_columns:
                _store(context, builder, k_columns, v_columns, once, column)
                _store(context, builder, k_columns, v_columns, twice, running)
        for values, kind, array in ((totals, k_total, v_total), (largest, k_maximum, v_maximum)):
            for value, position in zip(values, images, strict=False):
                _store(context, builder, kind, array, position, value)
        return context.get_dummy_value()

    return types.void(pixels, places, width, rows, total, maximum, columns), build


@_intrinsic
def masked_sum(typing: Any, pixels: Any, start: Any, groups: Any, edges: Any, lanes: Any, like: Any) -> Any:
    """Sum of the pixels of one frame that lie in groups of LANES pixels, in the type of the array `like`.

    `groups` = (array (k, 2) of first pixel and number of whole groups, first row, end), `edges` = (array (k,) of first
    pixels of groups of which only some lanes count, first row, end), `lanes` (k, LANES) uint8 says which.
    """
    target = like.dtype

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_pixels, v_start, v_groups, v_edges, v_lanes, _ = args
        k_pixels, _, k_groups, k_edges, k_lanes, _ = signature.args
        floating = isinstance(target, types.Float)
        add = builder.fadd if floating else builder.add
        element = ir.DoubleType() if floating else ir.IntType(target.bitwidth)
        total = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(element, LANES), None))
        runs, first, end = (builder.extract_value(v_groups, k) for k in range(3))
        word, step = v_start.type, ir.Constant(v_start.type, LANES)
        table = context.make_array(k_groups[0])(context, builder, value=runs).data

        def count(value: Any) -> None:
            wide = _widen(builder, value, k_pixels.dtype, target)
            builder.store(add(builder.load(total), wide), total)

        with cgutils.for_range_slice(builder, first, end, ir.Constant(word, 1), word) as (run, _):
            row = builder.gep(table, [builder.mul(run, ir.Constant(word, 2))])
            position = builder.add(v_start, builder.load(row))
            number = builder.load(builder.gep(row, [ir.Constant(word, 1)]))
            with cgutils.for_range(builder, number) as loop:
                here = builder.add(position, builder.mul(loop.index, step))
                count(_load(context, builder, k_pixels, v_pixels, here))
        some, first, end = (builder.extract_value(v_edges, k) for k in range(3))
        table = context.make_array(k_edges[0])(context, builder, value=some).data
        with cgutils.for_range_slice(builder, first, end, ir.Constant(word, 1), word) as (edge, _):
            position = builder.add(v_start, builder.load(builder.gep(table, [edge])))
            value = _load(context, builder, k_pixels, v_pixels, position)
            mask = _load(context, builder, k_lanes, v_lanes, builder.mul(edge, step))
            chosen = builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, None))
            count(builder.select(chosen, value, ir.Constant(value.type, None)))
        return _add_lanes(builder, builder.load(total), add)

    return target(pixels, start, groups, edges, lanes, like), build


@_intrinsic
def dot4x4(typing: Any, pixels: Any, at: Any, images: Any, rows: Any, groups: Any, out: Any) -> Any:
    """Add to out[4 f + k] the sums of pixel times weight of four frames f and four images k.

    The frames begin at positions `at` of `pixels`, the images at positions `rows` of the flat array `images`; `groups`
    times LANES pixels are taken. Sixteen accumulators stay in registers and every loaded value is used four times.
    """
    source, real = pixels.dtype, images.dtype

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_pixels, v_at, v_images, v_rows, v_groups, v_out = args
        k_pixels, _, k_images, _, _, k_out = signature.args
        vector = ir.VectorType(ir.FloatType() if real.bitwidth == 32 else ir.DoubleType(), LANES)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(16)]
        fused = ("contract",)
        with cgutils.for_range(builder, v_groups) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
            weights = [
                _load(context, builder, k_images, v_images, builder.add(builder.extract_value(v_rows, k), offset))
                for k in range(4)
            ]
            for f in range(4):
                place = builder.add(builder.extract_value(v_at, f), offset)
                value = _real(builder, _load(context, builder, k_pixels, v_pixels, place), source, vector)
                for k, weight in enumerate(weights):
                    product = builder.fmul(value, weight, flags=fused)
                    builder.store(builder.fadd(builder.load(sums[4 * f + k]), product, flags=fused), sums[4 * f + k])
        data = context.make_array(k_out)(context, builder, value=v_out).data
        for k, cell in enumerate(sums):
            found = _add_lanes(builder, builder.load(cell), builder.fadd)
            found = found if real.bitwidth == 64 else builder.fpext(found, ir.DoubleType())
            target = builder.gep(data, [ir.Constant(v_groups.type, k)])
            builder.store(builder.fadd(builder.load(target), found), target)
        return context.get_dummy_value()

    return types.void(pixels, at, images, rows, groups, out), build


def _real(builder: Any, value: Any, source: Any, vector: Any) -> Any:
    """Pixels as real numbers."""
    if value.type == vector:
        return value
    if isinstance(source, types.Float):
        return builder.fpext(value, vector)
    return builder.sitofp(value, vector) if source.signed else builder.uitofp(value, vector)
