"""The machine that runs CUDA C++ on the CPU: small kernels whose results, and whose mistakes, are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from emulation import needs_compiler
from emulation.build import (
    ORDERS,
    CompileError,
    LaunchError,
    compile_kernels,
    compile_library,
    kernel_source,
    run_under_sanitizer,
)

pytestmark = needs_compiler

RIGHT = r"""
typedef unsigned long long u64;

template <typename Value, int FACTOR>
__global__ void tree(const Value* values, u64* total, long long count) {
    DYNAMIC_SHARED(u64, sums);
    const int thread = threadIdx.x;
    const long long i = (long long)blockIdx.x * blockDim.x + thread;
    sums[thread] = i < count ? FACTOR * (u64)values[i] : 0;
    __syncthreads();
    for (int half = 512; half; half /= 2) {
        if (thread < half && thread + half < blockDim.x) sums[thread] += sums[thread + half];
        __syncthreads();
    }
    if (thread == 0) atomicAdd(total, sums[0]);
}

__global__ void identity(unsigned* out) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block << 16 | thread | 1u << 31;
}

// who comes first: block and thread in the order in which they ran
__global__ void sequence(unsigned* count, unsigned* out) {
    out[atomicAdd(count, 1u)] = blockIdx.x << 16 | threadIdx.x;
}

// what every lane gets; 12 numbers a thread
template <typename T> __global__ void lanes(const T* in, T* out, int width) {
    const int thread = threadIdx.x, lane = thread % 32;
    const T value = in[thread];
    T* to = out + 12 * thread;
    to[0] = __shfl_sync(~0u, value, 3);
    to[1] = __shfl_sync(~0u, value, lane + 5, width);
    to[2] = __shfl_up_sync(~0u, value, 3, width);
    to[3] = __shfl_down_sync(~0u, value, 3, width);
    to[4] = __shfl_xor_sync(~0u, value, 5, width);
    to[5] = __ballot_sync(~0u, value > 40);
    to[6] = __any_sync(~0u, value > 60);
    to[7] = __all_sync(~0u, value > 20);
    to[8] = __reduce_add_sync(~0u, (unsigned)value);
    to[9] = __reduce_max_sync(~0u, -(int)value);
    to[10] = __syncthreads_count(value > 50);
    to[11] = __syncthreads_and(value > 10) * 2 + __syncthreads_or(value > 90);
}

// even and odd lanes go separate ways, then half-warps do
__global__ void parts(unsigned* out) {
    const unsigned thread = threadIdx.x, lane = thread % 32;
    unsigned value = lane;
    if (lane % 2) {
        for (int distance = 16; distance > 1; distance /= 2) value += __shfl_xor_sync(0xaaaaaaaau, value, distance);
    } else {
        value = __reduce_max_sync(0x55555555u, value);
    }
    __syncwarp();
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    for (int k = 0; k < 1 + (lane >= 16); ++k) value += __shfl_xor_sync(half, value, 1);
    out[thread] = value;
}

__global__ void atomics(int* whole, u64* wide, float* real, double* fine) {
    const int value = (int)(threadIdx.x * 37 % 101) - 50;
    atomicAdd(whole, value);
    atomicAdd((unsigned*)whole + 1, (unsigned)value);
    atomicMax(whole + 2, value);
    atomicMin(whole + 3, value);
    atomicOr(whole + 4, 1 << threadIdx.x % 31);
    atomicAnd(whole + 5, ~(1 << threadIdx.x % 31));
    if (atomicCAS(whole + 6, 7, value) == 7) atomicExch(whole + 7, value);
    atomicAdd(wide, 1ull << 40);
    atomicMax((long long*)wide + 1, -1000ll + value);
    atomicMin(wide + 2, 5ull + threadIdx.x);
    atomicAdd(real, 0.5f);
    atomicAdd(fine, 0.25);
}

// unsigned words in, results one behind the other
__global__ void words(const unsigned* a, const unsigned* b, const unsigned* c, unsigned* out, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const unsigned x = a[i], y = b[i], z = c[i];
        unsigned* to = out + 16 * i;
        to[0] = __dp4a(x, y, z);
        to[1] = __dp4a((int)x, (int)y, (int)z);
        to[2] = __dp2a_lo(x, y, z);
        to[3] = __dp2a_hi(x, y, z);
        to[4] = __dp2a_lo((int)x, (int)y, (int)z);
        to[5] = __dp2a_hi((int)x, (int)y, (int)z);
        to[6] = __byte_perm(x, y, 0x6240);
        to[7] = __vmaxu2(x, y);
        to[8] = __vmaxs2(x, y);
        to[9] = __vmaxu4(x, y);
        to[10] = __vminu2(x, y);
        to[11] = __vaddus4(x, y);
        to[12] = __umulhi(x, y);
        to[13] = __popc(x) | __clz(x) << 8 | __ffs(y) << 16;
        to[14] = __brev(x);
        to[15] = __funnelshift_r(x, y, z);
    }
}

__global__ void conversions(const double* in, long long* out, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        out[4 * i] = __double2ll_rn(in[i]);
        out[4 * i + 1] = __double2int_rn(in[i]);
        out[4 * i + 2] = __float2uint_rn((float)in[i]);
        out[4 * i + 3] = (long long)__double2ull_rn(in[i]);
    }
}

// a, b, d: 4, 2 and 4 registers of every lane, one lane behind the other
__global__ void bytes(const unsigned* a, const unsigned* b, int* d) {
    const int lane = threadIdx.x % 32, tile = threadIdx.x / 32;
    unsigned left[4], right[2];
    int sums[4];
    for (int r = 0; r < 4; ++r) left[r] = a[(tile * 32 + lane) * 4 + r], sums[r] = d[(tile * 32 + lane) * 4 + r];
    for (int r = 0; r < 2; ++r) right[r] = b[(tile * 32 + lane) * 2 + r];
    mma_u8(sums, left, right);
    for (int r = 0; r < 4; ++r) d[(tile * 32 + lane) * 4 + r] = sums[r];
}

__global__ void halves(const unsigned* a, const unsigned* b, float* d) {
    const int lane = threadIdx.x;
    unsigned left[4], right[2];
    float sums[4];
    for (int r = 0; r < 4; ++r) left[r] = a[lane * 4 + r], sums[r] = d[lane * 4 + r];
    for (int r = 0; r < 2; ++r) right[r] = b[lane * 2 + r];
    mma_bf16(sums, left, right);
    for (int r = 0; r < 4; ++r) d[lane * 4 + r] = sums[r];
}
"""
RIGHT_NAMES = [
    *(
        "tree<unsigned short, 1>",
        "tree<float, 3>",
        "identity",
        "sequence",
        "lanes<int>",
        "lanes<long long>",
        "lanes<double>",
    ),
    *("parts", "atomics", "words", "conversions", "bytes", "halves"),
]

WRONG = r"""
__global__ void racy_tree(const int* values, int* total) {
    DYNAMIC_SHARED(int, sums);
    const int thread = threadIdx.x;
    sums[thread] = values[thread];
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2)
        if (thread < half) sums[thread] += sums[thread + half];
    if (thread == 0) *total = sums[0];
}
// a warp writes after its shuffle, another reads after its second one: no block barrier between them
__global__ void racy_warps(int* out) {
    __shared__ int told;
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) told = 0;
    __syncthreads();
    if (warp == 0) { __syncwarp(); told = 1; }
    if (warp == 1) { __syncwarp(); __syncwarp(); __syncwarp(); out[threadIdx.x - 32] = told; }
}
__global__ void racy_blocks(int* out) { out[blockIdx.x + 1] = out[blockIdx.x] + 1; }
__global__ void part_of_block() { if (threadIdx.x < 7) __syncthreads(); }
__global__ void warp_and_block() { if (threadIdx.x < 7) __syncthreads(); else __syncwarp(); }
__global__ void other_masks() { __syncwarp(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u); }
__global__ void other_operations(int* out) {
    if (threadIdx.x < 16) out[0] = __shfl_sync(~0u, 1, 0); else out[1] = __ballot_sync(~0u, 1);
}
__global__ void ended_lane(int* out) {
    if (threadIdx.x == 9) return;
    out[threadIdx.x] = __shfl_down_sync(~0u, 1, 1);
}
__global__ void ended_late(int* out) {
    if (threadIdx.x % 32 == 31) return;
    out[threadIdx.x] = __shfl_down_sync(~0u, 1, 1);
}
__global__ void not_in_mask() { __syncwarp(0xfffffffeu); }
__global__ void misaligned(const unsigned char* bytes, unsigned* out) {
    const uint4 four = *reinterpret_cast<const uint4*>(bytes);
    out[0] = four.x ^ four.w;
}
__global__ void misaligned_cached(const unsigned short* bytes, unsigned* out) {
    out[0] = __ldg(reinterpret_cast<const uint2*>(bytes)).y;
}
__global__ void far_shift(unsigned* out) { out[0] = 1u << (31 + blockDim.x); }
__global__ void beyond_shared_array(int* out) {
    __shared__ int four[4];
    four[threadIdx.x] = 1;
    out[0] = four[0];
}
__global__ void beyond_dynamic_shared(int* out) {
    DYNAMIC_SHARED(int, some);
    some[threadIdx.x] = 1;
    out[0] = some[0];
}
__global__ void half_warp_product(int* out) {
    int d[4] = {};
    unsigned a[4] = {}, b[2] = {};
    mma_u8(d, a, b);
    out[0] = d[0];
}
__global__ void reads_shared_first(int* out) {
    __shared__ int kept;
    DYNAMIC_SHARED(int, moved);
    out[2 * blockIdx.x] = kept;
    out[2 * blockIdx.x + 1] = moved[0];
    kept = moved[0] = 3;
}
template <typename T> __global__ void scalar(T value, T* out) { *out = value; }
__global__ void source_outside(int* out) { out[threadIdx.x] = __shfl_sync(~0u, 1, 31); }
"""
WRONG_NAMES = [
    *("racy_tree", "racy_warps", "racy_blocks", "part_of_block", "warp_and_block", "other_masks", "other_operations"),
    *("ended_lane", "ended_late", "not_in_mask", "misaligned", "misaligned_cached", "far_shift"),
    *("beyond_shared_array", "beyond_dynamic_shared", "half_warp_product", "reads_shared_first", "source_outside"),
    *("scalar<long long>", "scalar<unsigned>", "scalar<float>"),
]


@pytest.fixture(scope="module")
def right():
    return compile_kernels(RIGHT, RIGHT_NAMES)


@pytest.fixture(scope="module")
def wrong():
    return compile_kernels(WRONG, WRONG_NAMES)


def numbers(seed, shape, high=2**32, dtype=np.uint32):
    return np.random.default_rng(seed).integers(0, high, shape, dtype, endpoint=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [1, 31, 32, 33, 100, 1000, 1024])
def test_tree_is_exact_in_every_order(right, threads, order):
    values = numbers(threads, 3001, 65536, np.uint16)
    total = np.zeros(1, np.uint64)
    grid = (-(-values.size // threads),)
    right.launch("tree<unsigned short, 1>", grid, (threads,), [values, total, np.int64(3001)], 8 * threads, order=order)
    assert total[0] == values.sum(dtype=np.uint64)
    right.launch(
        "tree<float, 3>", grid, (threads,), [values.astype(np.float32), total, np.int64(3001)], 8 * threads, order
    )
    assert total[0] == 4 * values.sum(dtype=np.uint64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid, block", [((3, 5, 2), (7, 3, 2)), ((1,), (33,)), ((4, 1), (8, 1, 64))])
def test_every_thread_of_every_block_runs_once(right, grid, block, order):
    blocks, threads = np.prod(grid), np.prod(block)
    out = np.zeros((blocks, threads), np.uint32)
    right.launch("identity", grid, block, [out], order=order)
    expected = np.arange(blocks)[:, None] << 16 | np.arange(threads) | 1 << 31
    np.testing.assert_array_equal(out, expected)


def test_orders_are_orders_of_blocks_and_of_threads(right):
    found = {}
    for order in ORDERS:
        out = np.zeros(5 * 70, np.uint32)
        right.launch("sequence", (5,), (70,), [np.zeros(1, np.uint32), out], order=order)
        found[order] = out.tolist()
    expected = [block << 16 | thread for block in range(5) for thread in range(70)]
    assert found["ascending"] == expected
    assert found["descending"] == expected[::-1]
    for order in ORDERS[2:]:
        assert sorted(found[order]) == expected
        # one block after the other, but neither they nor their threads in order
        blocks = [entry >> 16 for entry in found[order]]
        assert sum(a != b for a, b in itertools.pairwise(blocks)) == 4
        assert found[order] not in (expected, expected[::-1])
    assert len({tuple(entry >> 16 for entry in found[order]) for order in ORDERS}) > 2
    assert len({tuple(run) for run in found.values()}) == len(ORDERS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name, dtype", [("int", np.int32), ("long long", np.int64), ("double", np.float64)])
@pytest.mark.parametrize("threads, width", [(64, 32), (96, 8), (32, 16), (64, 1)])
def test_warp_operations(right, name, dtype, threads, width, order):
    values = numbers(7, threads, 100, np.int64).astype(dtype)
    out = np.zeros((threads, 12), dtype)
    right.launch(f"lanes<{name}>", (1,), (threads,), [values, out, np.int32(width)], order=order)
    for warp in range(threads // 32):
        mine = values[32 * warp : 32 * warp + 32]
        for lane in range(32):
            first = lane - lane % width
            last = first + width - 1
            expected = [
                mine[3],
                mine[first + (lane + 5) % width],
                mine[lane - 3] if lane - 3 >= first else mine[lane],
                mine[lane + 3] if lane + 3 <= last else mine[lane],
                mine[lane ^ 5] if lane ^ 5 <= last else mine[lane],
                _like_device(sum(1 << k for k in range(32) if mine[k] > 40), dtype),
                any(mine > 60),
                all(mine > 20),
                sum(mine),
                -min(mine),
                sum(values > 50),
                2 * all(values > 10) + any(values > 90),
            ]
            np.testing.assert_array_equal(out[32 * warp + lane], np.array(expected, dtype), f"lane {lane}")


def _like_device(bits, dtype):
    return np.uint32(bits).astype(np.int32) if dtype == np.int32 else bits


@pytest.mark.parametrize("order", ORDERS)
def test_parts_of_a_warp_go_separate_ways(right, order):
    out = np.zeros(64, np.uint32)
    right.launch("parts", (1,), (64,), [out], order=order)
    lane = np.arange(32)
    value = np.where(lane % 2, 256, 30)  # 1 + 3 + ... + 31 = 256; the largest even lane is 30
    once = value + value[lane ^ 1]
    expected = np.where(lane < 16, once, once + once[lane ^ 1])
    np.testing.assert_array_equal(out, np.tile(expected, 2))


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(right, order):
    whole = np.array([0, 0, -999, 999, 0, -1, 7, 0], np.int32)
    wide = np.array([3, 2**64 - 5000, 999], np.uint64)
    real, fine = np.zeros(1, np.float32), np.zeros(1)
    right.launch("atomics", (1,), (1000,), [whole, wide, real, fine], order=order)
    values = np.arange(1000) * 37 % 101 - 50
    assert list(whole[:4]) == [values.sum(), values.sum(), 50, -50]
    assert (whole[4], whole[5]) == (2**31 - 1, -(2**31))
    # one thread found the 7; a later one may have found it again
    assert whole[7] in values
    assert list(wide) == [3 + 1000 * 2**40, 2**64 - 950, 5]
    assert (real[0], fine[0]) == (500, 250)


def test_words(right):
    a, b, c = (numbers(seed, 500) for seed in range(3))
    a[:3], b[:3] = [0, 0xFFFFFFFF, 0x80008000], [0xFFFFFFFF, 0xFFFFFFFF, 0x80FF7F01]
    out = np.zeros((500, 16), np.uint32)
    right.launch("words", (1,), (33,), [a, b, c, out, np.int32(500)])
    x, y, z = (v.astype(np.int64) for v in (a, b, c))
    bytes_a, bytes_b = (v.view(np.uint8).reshape(-1, 4).astype(np.int64) for v in (a, b))
    signed_a, signed_b = (v.view(np.int8).reshape(-1, 4).astype(np.int64) for v in (a, b))
    words_a, words_b = (v.view(np.uint16).reshape(-1, 2).astype(np.int64) for v in (a, b))
    short_a, short_b = (v.view(np.int16).reshape(-1, 2).astype(np.int64) for v in (a, b))
    joined = z % 32
    expected = [
        z + (bytes_a * bytes_b).sum(1),
        z + (signed_a * signed_b).sum(1),
        z + (words_a * bytes_b[:, :2]).sum(1),
        z + (words_a * bytes_b[:, 2:]).sum(1),
        z + (short_a * signed_b[:, :2]).sum(1),
        z + (short_a * signed_b[:, 2:]).sum(1),
        _join(bytes_a[:, 0], bytes_b[:, 0], bytes_a[:, 2], bytes_b[:, 2], bits=8),
        _join(*np.maximum(words_a, words_b).T, bits=16),
        _join(*np.maximum(short_a, short_b).T, bits=16),
        _join(*np.maximum(bytes_a, bytes_b).T, bits=8),
        _join(*np.minimum(words_a, words_b).T, bits=16),
        _join(*np.minimum(bytes_a + bytes_b, 255).T, bits=8),
        (a.astype(np.uint64) * b) >> np.uint64(32),
        [
            int(i).bit_count() | (32 - int(i).bit_length()) << 8 | (int(j & -j).bit_length()) << 16
            for i, j in zip(x, y, strict=True)
        ],
        [int(f"{i:032b}"[::-1], 2) for i in x],
        [(int(j) << 32 | int(i)) >> int(k) & 0xFFFFFFFF for i, j, k in zip(x, y, joined, strict=True)],
    ]
    for k, column in enumerate(expected):
        np.testing.assert_array_equal(out[:, k], np.array(column).astype(np.int64) & 0xFFFFFFFF, f"result {k}")


def _join(*parts, bits):
    return sum((part & ((1 << bits) - 1)) << bits * k for k, part in enumerate(parts))


def test_conversions_saturate_as_on_the_device(right):
    values = np.array([0.5, 1.5, -2.5, 3e9, -3e9, 1e30, -1e30, np.nan, np.inf, 2.0**63, -(2.0**63), 4294967295.0])
    out = np.zeros((values.size, 4), np.int64)
    right.launch("conversions", (1,), (32,), [values, out, np.int32(values.size)])
    for column, (low, high) in enumerate(
        [(-(2**63), 2**63 - 1), (-(2**31), 2**31 - 1), (0, 2**32 - 1), (0, 2**64 - 1)]
    ):
        for value, found in zip(values, out[:, column], strict=True):
            rounded = float(np.float32(value)) if column == 2 else float(value)
            exact = 0 if np.isnan(value) else high if rounded >= high else low if rounded <= low else round(rounded)
            assert int(found) % 2**64 == exact % 2**64, (column, value)


def product(a, b, d, per_register, multiply):
    """d + a b of one warp from its registers, laid out as the PTX ISA writes it: one element after the other."""
    depth = 8 * per_register
    left, right_ = np.zeros((16, depth), object), np.zeros((depth, 8), object)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(4 * per_register):
            register, element = divmod(i, per_register)
            row = group if register in (0, 2) else group + 8
            column = thread * per_register + element + (0 if register < 2 else depth // 2)
            left[row, column] = a[lane][i]
        for i in range(2 * per_register):
            register, element = divmod(i, per_register)
            row = thread * per_register + element + (0 if register == 0 else depth // 2)
            right_[row, group] = b[lane][i]
    out = np.zeros((32, 4), object)
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2
            out[lane, i] = multiply(left[row], right_[:, column]) + d[lane, i]
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_product_of_bytes(right, order):
    a, b, d = numbers(1, (96, 4)), numbers(2, (96, 2)), numbers(3, (96, 4)).view(np.int32)
    found = d.copy()
    right.launch("bytes", (1,), (96,), [a, b, found], order=order)
    for tile in range(3):
        mine = slice(32 * tile, 32 * tile + 32)
        elements = [v[mine].view(np.uint8).reshape(32, -1).astype(int).tolist() for v in (a, b)]
        expected = product(*elements, d[mine].astype(object), 4, lambda x, y: sum(x * y))
        wrapped = (expected % 2**32).astype(np.uint32).view(np.int32)
        np.testing.assert_array_equal(found[mine], wrapped)


@pytest.mark.parametrize("order", ORDERS)
def test_product_of_bfloat16(right, order):
    # whole numbers of eight bits: exact in bfloat16, and their sums in float
    left, right_, d = numbers(1, (32, 8), 256) - 128.0, numbers(2, (32, 4), 256) * 0.5, numbers(3, (32, 4), 1000)
    a, b = (((v.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)) for v in (left, right_))
    found = d.astype(np.float32)
    right.launch("halves", (1,), (32,), [a.view(np.uint32), b.view(np.uint32), found], order=order)
    expected = product(left.tolist(), right_.tolist(), d.astype(object), 2, lambda x, y: sum(x * y))
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(
    "name, grid, threads, right_answer",
    [("racy_tree", 1, 256, [3840] * 1), ("racy_warps", 1, 64, [1] * 32), ("racy_blocks", 5, 1, [0, 1, 2, 3, 4, 5])],
)
def test_a_race_shows_in_some_order(wrong, name, grid, threads, right_answer):
    outcomes = set()
    for order in ORDERS:
        out = np.zeros(len(right_answer), np.int32)
        args = [np.full(256, 15, np.int32), out] if name == "racy_tree" else [out]
        wrong.launch(name, (grid,), (threads,), args, 4 * threads, order)
        outcomes.add(tuple(out.tolist()) == tuple(right_answer))
    assert False in outcomes


@pytest.mark.parametrize(
    "name, threads, message",
    [
        ("part_of_block", 64, "reached by only a part of the block: 7 of 64 threads"),
        ("warp_and_block", 32, "mixed barriers in one warp: lanes 0000007f"),
        ("other_masks", 32, "ended"),
        ("other_operations", 32, "deadlock"),
        ("ended_lane", 32, "ended"),
        ("ended_late", 64, "ended"),
        ("not_in_mask", 32, "does not name the calling lane 0"),
        ("far_shift", 1, "shift by 32 bits"),
        ("beyond_shared_array", 5, "index out of bounds.*: 4"),
        ("beyond_dynamic_shared", 17, "wrote byte 64 of its dynamic shared memory of 64 bytes"),
        ("half_warp_product", 31, "full warp"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_broken_rules_are_errors(wrong, name, threads, message, order):
    takes_out = len(wrong.parameters(name))
    out = [np.zeros(64, np.int32)] * takes_out
    for _ in range(2):
        with pytest.raises(LaunchError, match=message):
            wrong.launch(name, (2,), (threads,), out, 64, order)
    # what failed leaves nothing behind
    wrong.launch("racy_blocks", (1,), (1024,), [np.zeros(64, np.int32)], order=order)


@pytest.mark.parametrize("name, dtype, step", [("misaligned", np.uint8, 1), ("misaligned_cached", np.uint16, 1)])
def test_misaligned_vector_loads_are_errors(wrong, name, dtype, step):
    values, out = np.arange(64).astype(dtype), np.zeros(1, np.uint32)
    assert values.ctypes.data % 16 == 0
    wrong.launch(name, (1,), (1,), [values, out])
    with pytest.raises(LaunchError, match=r"misaligned access.*where the type needs (16|8) bytes"):
        wrong.launch(name, (1,), (1,), [values[step:], out])


def test_shared_memory_begins_as_garbage(wrong):
    out = np.zeros(6, np.int32)
    wrong.launch("reads_shared_first", (3,), (1,), [out], 4)
    assert set(out.view(np.uint32)) == {0xCDCDCDCD}


def test_a_lane_that_is_not_there_gives_garbage(wrong):
    out = np.zeros(32, np.int32)
    wrong.launch("source_outside", (1,), (31,), [out])
    assert set(out.view(np.uint32)) == {0xCDCDCDCD, 0}
    wrong.launch("source_outside", (1,), (32,), [out])
    assert set(out) == {1}


@pytest.mark.parametrize(
    "name, value",
    [("scalar<long long>", np.int64(-3)), ("scalar<unsigned>", np.uint32(7)), ("scalar<float>", np.float32(0.5))],
)
def test_arguments_must_have_the_kernels_types(wrong, name, value):
    out = np.zeros(1, value.dtype)
    wrong.launch(name, (1,), (1,), [value, out])
    assert out[0] == value
    for other in [np.int32(3), np.uint64(3), np.float64(3), 3, 3.0, out]:
        with pytest.raises(TypeError, match=f"argument 0 of {name}.*{value.dtype}"):
            wrong.launch(name, (1,), (1,), [other, out])
    with pytest.raises(TypeError, match="takes 2 arguments, not 1"):
        wrong.launch(name, (1,), (1,), [value])
    with pytest.raises(TypeError, match="takes a pointer"):
        wrong.launch(name, (1,), (1,), [value, value])
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        wrong.launch(name, (1,), (1,), [value, out])
    with pytest.raises(ValueError, match="not contiguous"):
        wrong.launch(name, (1,), (1,), [value, np.zeros(4, value.dtype)[::2]])


@pytest.mark.parametrize("grid, block, message", [
    ((1,), (1025,), "block too large"), ((1,), (1, 1, 65), "block too large"), ((0,), (1,), "without threads"),
    ((1, 65536), (1,), "grid too large"),
])  # fmt: skip
def test_shapes_that_a_device_refuses(right, grid, block, message):
    with pytest.raises(LaunchError, match=message):
        right.launch("identity", grid, block, [np.zeros(1, np.uint32)])


def test_orders_and_names_that_are_not_there(right):
    with pytest.raises(ValueError, match="ascending, descending or random"):
        right.launch("identity", (1,), (1,), [np.zeros(1, np.uint32)], order="backwards")
    with pytest.raises(KeyError, match="was not compiled"):
        right.launch("tree<int, 2>", (1,), (1,), [])


def test_a_wrong_text_is_told_with_the_compilers_log():
    with pytest.raises(CompileError, match=r"wrong\.cu:7"):
        compile_kernels('#line 7 "wrong.cu"\n__global__ void wrong(int* p) { p[0] = nothing; }', ["wrong"])


def test_what_was_compiled_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUEM_EMULATION_CACHE", str(tmp_path))
    text = "__global__ void one(int* p) { *p = 1; }"
    first = compile_library(text, ["one"])
    kept = first.stat().st_mtime_ns
    assert compile_library(text, ["one"]) == first
    assert first.stat().st_mtime_ns == kept
    assert compile_library(text + "\n", ["one"]) != first
    assert compile_library(text, ["one"], ["-O2"]) != first
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"] * 3


def test_headers_are_put_in_once(tmp_path):
    (tmp_path / "a.cuh").write_text("constexpr int A = 4;\n")
    (tmp_path / "b.cuh").write_text('#include "a.cuh"\nconstexpr int B = A + 1;\n')
    (tmp_path / "both.cu").write_text(
        '#include "a.cuh"\n#include "b.cuh"\n__global__ void both(int* p) {\n    *p = A * B + __LINE__;\n}\n'
    )
    out = np.zeros(1, np.int32)
    compile_kernels(kernel_source("both", tmp_path), ["both"]).launch("both", (1,), (1,), [out])
    assert out[0] == 24


SANITIZED = """
import numpy as np
from emulation.build import compile_kernels
source = '''
__global__ void shifted(int* out, int first) { __syncthreads(); out[first + (int)threadIdx.x] = 1; }
__global__ void shared(int* out) {
    DYNAMIC_SHARED(int, some);
    some[threadIdx.x] = 1;
    __syncthreads();
    out[0] = some[0];
}
'''
kernels = compile_kernels(source, ["shifted", "shared"])
values = np.zeros(96, np.int32)
"""


@pytest.mark.parametrize(
    "line, report",
    [
        ("kernels.launch('shifted', (1,), (33,), [values, np.int32(63)])", None),
        ("kernels.launch('shifted', (1,), (33,), [values, np.int32(64)])", "heap-buffer-overflow"),
        (
            "kernels.launch('shifted', (1,), (1,), [values[1:], np.int32(-2)], order='random(1)')",
            "heap-buffer-overflow",
        ),
        ("kernels.launch('shared', (2,), (33,), [values], 132)", None),
        ("kernels.launch('shared', (2,), (33,), [values], 128)", "heap-buffer-overflow"),
    ],
)
def test_the_sanitizer_finds_what_lies_outside(line, report):
    if report is None:
        assert "launched" in run_under_sanitizer(f"{SANITIZED}\n{line}\nprint('launched')").stdout
    else:
        with pytest.raises(AssertionError, match=report):
            run_under_sanitizer(f"{SANITIZED}\n{line}\n")


def test_errors_are_errors_under_the_sanitizer_too():
    code = f"""
import numpy as np
from emulation.build import LaunchError, compile_kernels
kernels = compile_kernels({WRONG!r}, {WRONG_NAMES!r})
for name, threads in [("part_of_block", 64), ("other_masks", 32), ("misaligned", 1)]:
    for order in ("ascending", "random(3)", "descending"):
        try:
            arguments = [np.zeros(64, np.uint8)[1:], np.zeros(4, np.uint32)]
            kernels.launch(name, (2,), (threads,), arguments if name == "misaligned" else [], order=order)
            raise SystemExit(f"{{name}} passed")
        except LaunchError as error:
            print(error)
out = np.zeros(1025, np.int32)
kernels.launch("racy_blocks", (1024,), (1,), [out])
print(out[-1])
"""
    lines = run_under_sanitizer(code).stdout.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "1024"
