// Blocks, warps and threads: which fiber runs next, when a barrier opens, how a grid is launched and what it refuses.
#pragma once

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

// the linker gathers the __shared__ variables of all kernels between these
extern "C" __attribute__((visibility("hidden"))) char gpuem_shared_begin[], gpuem_shared_end[];

namespace gpuem_cpu {
using Lanes = unsigned;  // one bit for each lane of a warp
using Combine = void (*)(void* const* operands, Lanes present);

enum Order { ASCENDING = 0, DESCENDING = 1, RANDOM = 2 };
constexpr unsigned MOST_THREADS = 1024;
constexpr size_t PAGE = 4096, GUARD = 256, MOST_REFILLED = 128 * 1024;
constexpr int GARBAGE = 0xCD;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 256 * 1024;
#else
constexpr size_t STACK = 64 * 1024;
#endif

struct Fiber {
    ucontext_t context;
    void* jump[5];
    bool entered;
    char* stack;
    size_t stack_bytes;
    void* fake_stack;
    unsigned number;
    uint3 thread;
};

struct Warp {
    Lanes exist, runnable, waiting, at_barrier, ended;
    Lanes mask[32];
    Combine combine[32];
    void* operands[32];
};

struct Machine {
    Fiber host;
    Fiber* fibers;
    Fiber* current;
    unsigned ready_made, threads, warps, ready_warps, warp;
    Warp warp_state[MOST_THREADS / 32];
    void (*kernel)(void** arguments);
    void** arguments;
    char* shared;
    Order order;
    uint64_t random;
    int barrier_count, barrier_result;
    bool failed;
    char message[1024];
};
static Machine machine;

inline unsigned draw(unsigned below) {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return unsigned((machine.random >> 32) * below >> 32);
}

inline unsigned choose_bit(unsigned bits) {
    if (machine.order == ASCENDING) return __builtin_ctz(bits);
    if (machine.order == DESCENDING) return 31 - __builtin_clz(bits);
    for (unsigned skip = draw(__builtin_popcount(bits)); skip; --skip) bits &= bits - 1;
    return __builtin_ctz(bits);
}

__attribute__((noinline, no_sanitize_address)) static void resume(Fiber* to) {
    if (to->entered) __builtin_longjmp(to->jump, 1);
    to->entered = true;
    setcontext(&to->context);
}

// noipa: the compiler must believe that any variable of this file changes in here. The compiler's own setjmp is fast,
// and AddressSanitizer does not take it for an escape from the stack.
__attribute__((noipa, no_sanitize_address)) static void switch_fiber(Fiber* from, Fiber* to) {
    machine.current = to;
    threadIdx = to->thread;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
#endif
    if (!__builtin_setjmp(from->jump)) resume(to);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(machine.current->fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
    const char* place = "block (%u, %u, %u), thread (%u, %u, %u): ";
    int used = snprintf(machine.message, sizeof machine.message, place, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
                        threadIdx.y, threadIdx.z);
    va_list values;
    va_start(values, format);
    vsnprintf(machine.message + used, sizeof machine.message - used, format, values);
    va_end(values);
    machine.failed = true;
    switch_fiber(machine.current, &machine.host);
    abort();  // never reached: a failed block is not resumed
}

inline bool open_barrier() {
    unsigned arrived = 0, ended = 0;
    for (unsigned w = 0; w < machine.warps; ++w) {
        arrived += __builtin_popcount(machine.warp_state[w].at_barrier);
        ended += __builtin_popcount(machine.warp_state[w].ended);
    }
    if (ended == machine.threads) return false;
    if (arrived != machine.threads)
        fail("__syncthreads was reached by only a part of the block: %u of %u threads wait there, %u have ended",
             arrived, machine.threads, ended);
    for (unsigned w = 0; w < machine.warps; ++w) {
        machine.warp_state[w].runnable = machine.warp_state[w].exist;
        machine.warp_state[w].at_barrier = 0;
        machine.ready_warps |= 1u << w;
    }
    machine.barrier_result = machine.barrier_count;
    machine.barrier_count = 0;
    return true;
}

inline Fiber* choose_fiber() {
    if (!machine.ready_warps && !open_barrier()) return &machine.host;
    bool stays = machine.ready_warps >> machine.warp & 1;
    if (!stays || (machine.order == RANDOM && draw(8) == 0)) machine.warp = choose_bit(machine.ready_warps);
    Warp& warp = machine.warp_state[machine.warp];
    unsigned lane = choose_bit(warp.runnable);
    warp.runnable &= ~(1u << lane);
    if (!warp.runnable) machine.ready_warps &= ~(1u << machine.warp);
    return &machine.fibers[machine.warp * 32 + lane];
}

inline void check_progress(const Warp& warp) {
    if (warp.runnable || !warp.waiting) return;
    if (warp.at_barrier)
        fail("mixed barriers in one warp: lanes %08x wait at __syncthreads, lanes %08x at a warp operation",
             warp.at_barrier, warp.waiting);
    fail("deadlock: lanes %08x wait at warp operations that differ in kind or mask", warp.waiting);
}

inline void leave_to_next() {
    Fiber* self = machine.current;
    Fiber* next = choose_fiber();
    if (next != self) switch_fiber(self, next);
}

inline void end_thread() {
    unsigned number = machine.current->number, lane = number % 32;
    Warp& warp = machine.warp_state[number / 32];
    warp.ended |= 1u << lane;
    for (Lanes rest = warp.waiting; rest; rest &= rest - 1)
        if (unsigned other = __builtin_ctz(rest); warp.mask[other] >> lane & 1)
            fail("the thread ended while lane %u waits for it in a warp operation with mask %08x", other,
                 warp.mask[other]);
    check_progress(warp);
    leave_to_next();
}

// A warp operation: the lane leaves a pointer to its operands; the last lane of the mask combines them for all.
inline void collective(Lanes mask, void* operands, Combine combine) {
    unsigned number = machine.current->number, lane = number % 32;
    Warp& warp = machine.warp_state[number / 32];
    if (!(mask >> lane & 1)) fail("the mask %08x of a warp operation does not name the calling lane %u", mask, lane);
    mask &= warp.exist;
    if (mask & warp.ended)
        fail("a warp operation with mask %08x names lanes that ended: %08x", mask, mask & warp.ended);
    warp.mask[lane] = mask;
    warp.combine[lane] = combine;
    warp.operands[lane] = operands;
    warp.waiting |= 1u << lane;
    bool complete = (warp.waiting & mask) == mask;
    for (Lanes rest = mask; complete && rest; rest &= rest - 1) {
        unsigned other = __builtin_ctz(rest);
        complete = warp.mask[other] == mask && warp.combine[other] == combine;
    }
    if (complete) {
        combine(warp.operands, mask);
        warp.waiting &= ~mask;
        warp.runnable |= mask;
        machine.ready_warps |= 1u << number / 32;
    } else {
        check_progress(warp);
    }
    leave_to_next();
}

inline int block_barrier(int predicate) {
    unsigned number = machine.current->number;
    Warp& warp = machine.warp_state[number / 32];
    warp.at_barrier |= 1u << number % 32;
    machine.barrier_count += predicate != 0;
    check_progress(warp);
    leave_to_next();
    return machine.barrier_result;
}

static void enter_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    for (;;) {
        machine.kernel(machine.arguments);
        end_thread();
    }
}

// Stacks for all libraries of a process, since one launch runs at a time: a map with a guard page for every stack of
// every library would exceed what the system allows. `owner` is the library whose fibers stand on them.
struct Stacks {
    const void* owner;
    char* all;
};
static Stacks* shared_stacks = nullptr;
constexpr size_t STACK_ROOM = STACK + 2 * PAGE;

static Stacks* stacks() {
    if (!shared_stacks) {
        shared_stacks = static_cast<Stacks*>(calloc(1, sizeof(Stacks)));
        shared_stacks->all = static_cast<char*>(mmap(nullptr, STACK_ROOM * MOST_THREADS, PROT_READ | PROT_WRITE,
                                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        for (unsigned i = 0; i < MOST_THREADS; ++i) mprotect(shared_stacks->all + STACK_ROOM * i, PAGE, PROT_NONE);
    }
    return shared_stacks;
}

// The tops of the stacks are spread over the cache's sets; at equal distances all frames would fall into the same ones.
static void make_fibers(unsigned count) {
    if (!machine.fibers) {
        machine.fibers = static_cast<Fiber*>(calloc(MOST_THREADS, sizeof(Fiber)));
        for (unsigned i = 0; i < MOST_THREADS; ++i) {
            machine.fibers[i].stack = stacks()->all + STACK_ROOM * i + PAGE;
            machine.fibers[i].stack_bytes = STACK + i * 5 % 64 * 64;
            machine.fibers[i].number = i;
        }
    }
    if (stacks()->owner != &machine) machine.ready_made = 0;
    stacks()->owner = &machine;
    for (; machine.ready_made < count; ++machine.ready_made) {
        Fiber& fiber = machine.fibers[machine.ready_made];
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(fiber.stack, fiber.stack_bytes);
#endif
        fiber.entered = false;
        fiber.fake_stack = nullptr;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = fiber.stack_bytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter_fiber, 0);
    }
}

static void run_block() {
    machine.ready_warps = machine.barrier_count = 0;
    for (unsigned w = 0; w < machine.warps; ++w) {
        Warp& warp = machine.warp_state[w];
        unsigned lanes = machine.threads - 32 * w;
        warp.exist = warp.runnable = lanes < 32 ? (1u << lanes) - 1 : ~0u;
        warp.waiting = warp.at_barrier = warp.ended = 0;
        machine.ready_warps |= 1u << w;
    }
    machine.warp = choose_bit(machine.ready_warps);
    switch_fiber(&machine.host, choose_fiber());
    if (machine.failed) machine.ready_made = 0;  // fibers that stand in the middle of a kernel start anew
}

static int refuse(const char* what) {
    snprintf(machine.message, sizeof machine.message, "%s: grid (%u, %u, %u), block (%u, %u, %u)", what, gridDim.x,
             gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z);
    return 1;
}

// Shared memory holds garbage when a block begins. A library of so many kernels that this would take long gets it
// once a launch; AddressSanitizer forbids writing between variables.
static void spoil_shared_variables(bool first_block) {
#if !defined(__SANITIZE_ADDRESS__)
    size_t bytes = size_t(gpuem_shared_end - gpuem_shared_begin);
    if (first_block || bytes <= MOST_REFILLED) memset(gpuem_shared_begin, GARBAGE, bytes);
#endif
}

static int run_grid(size_t shared_bytes) {
    unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    unsigned* sequence = static_cast<unsigned*>(malloc(blocks * sizeof(unsigned)));
    for (unsigned i = 0; i < blocks; ++i) sequence[i] = machine.order == DESCENDING ? blocks - 1 - i : i;
    if (machine.order == RANDOM)
        for (unsigned i = blocks; i > 1; --i) {
            unsigned other = draw(i), kept = sequence[i - 1];
            sequence[i - 1] = sequence[other];
            sequence[other] = kept;
        }
#if defined(__SANITIZE_ADDRESS__)
    constexpr size_t guard = 0;  // the red zone behind the allocation does the same
#else
    constexpr size_t guard = GUARD;
#endif
    machine.shared = static_cast<char*>(aligned_alloc(16, (shared_bytes + guard + 15) / 16 * 16));
    for (unsigned i = 0; i < blocks && !machine.failed; ++i) {
        blockIdx = {sequence[i] % gridDim.x, sequence[i] / gridDim.x % gridDim.y, sequence[i] / gridDim.x / gridDim.y};
        memset(machine.shared, GARBAGE, shared_bytes + guard);
        spoil_shared_variables(i == 0);
        run_block();
        for (size_t byte = shared_bytes; byte < shared_bytes + guard && !machine.failed; ++byte)
            if (machine.shared[byte] != char(GARBAGE)) {
                machine.failed = true;
                snprintf(machine.message, sizeof machine.message,
                         "block (%u, %u, %u) wrote byte %zu of its dynamic shared memory of %zu bytes", blockIdx.x,
                         blockIdx.y, blockIdx.z, byte, shared_bytes);
            }
    }
    free(machine.shared);
    free(sequence);
    return machine.failed;
}

static int launch(void (*kernel)(void**), void** arguments, dim3 grid, dim3 block, size_t shared_bytes, int order,
                  uint64_t seed) {
    gridDim = grid;
    blockDim = block;
    machine.failed = false;
    machine.message[0] = 0;
    uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (!threads || !grid.x || !grid.y || !grid.z) return refuse("a grid or block without threads");
    if (threads > MOST_THREADS || block.z > 64) return refuse("block too large (1024 threads, 64 along z at most)");
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return refuse("grid too large (2147483647, 65535, 65535)");
    if (uint64_t(grid.x) * grid.y * grid.z > 1u << 28)
        return refuse("more than 2^28 blocks: too many for the emulation");
    machine.kernel = kernel;
    machine.arguments = arguments;
    machine.order = Order(order);
    machine.random = (seed + 1) * 0x9E3779B97F4A7C15ull | 1;
    machine.threads = unsigned(threads);
    machine.warps = (machine.threads + 31) / 32;
    make_fibers(machine.threads);
    for (unsigned i = 0; i < machine.threads; ++i)
        machine.fibers[i].thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    void* stack;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &machine.host.stack_bytes);
    pthread_attr_destroy(&attributes);
    machine.host.stack = static_cast<char*>(stack);
#endif
    machine.host.entered = true;
    return run_grid(shared_bytes);
}

// ---- what the shared library tells about its kernels ---------------------------------------------------------------
struct Entry {
    const char* expression;
    void (*run)(void** arguments);
    unsigned count;
    const unsigned* sizes;
    const char* kinds;
};

template <typename T>
constexpr char kind() {
    static_assert(!std::is_reference_v<T>, "a kernel takes its arguments by value");
    if (std::is_pointer_v<T>) return std::is_const_v<std::remove_pointer_t<T>> ? 'c' : 'p';
    if (std::is_same_v<T, bool>) return 'b';
    if (std::is_floating_point_v<T>) return 'f';
    if (std::is_integral_v<T>) return std::is_signed_v<T> ? 'i' : 'u';
    return 's';
}

template <auto kernel, typename Function = decltype(kernel)>
struct Describe;
template <auto kernel, typename... Arguments>
struct Describe<kernel, void (*)(Arguments...)> {
    template <size_t... index>
    static void call(void** arguments, std::integer_sequence<size_t, index...>) {
        kernel(*static_cast<Arguments*>(arguments[index])...);
    }
    static void run(void** arguments) { call(arguments, std::make_integer_sequence<size_t, sizeof...(Arguments)>()); }
    static constexpr unsigned sizes[] = {unsigned(sizeof(Arguments))..., 0};
    static constexpr char kinds[] = {kind<Arguments>()..., 0};
    static Entry entry(const char* expression) { return {expression, run, sizeof...(Arguments), sizes, kinds}; }
};

}  // namespace gpuem_cpu

// ---- undefined behaviour that the compiler is asked to check (-fsanitize=alignment,bounds,shift-exponent) ----------
namespace gpuem_cpu {
struct Place {
    const char* file;
    unsigned line, column;
};
struct BadPointer {
    Place place;
    void* type;
    unsigned char log_alignment, access;
};
}  // namespace gpuem_cpu
extern "C" {
__attribute__((used, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(void* data, void* pointer) {
    const auto& found = *static_cast<gpuem_cpu::BadPointer*>(data);
    gpuem_cpu::fail("misaligned access at %s:%u: address %p, where the type needs %u bytes", found.place.file,
                    found.place.line, pointer, 1u << found.log_alignment);
}
__attribute__((used, visibility("hidden"))) void __ubsan_handle_out_of_bounds(void* data, void* index) {
    const auto& place = *static_cast<gpuem_cpu::Place*>(data);
    gpuem_cpu::fail("index out of bounds at %s:%u: %lld", place.file, place.line, (long long)(intptr_t)index);
}
__attribute__((used, visibility("hidden"))) void __ubsan_handle_shift_out_of_bounds(void* data, void*, void* bits) {
    const auto& place = *static_cast<gpuem_cpu::Place*>(data);
    gpuem_cpu::fail("shift by %lld bits at %s:%u", (long long)(intptr_t)bits, place.file, place.line);
}
}
