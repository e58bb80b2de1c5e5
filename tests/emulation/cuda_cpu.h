// Runs unchanged CUDA C++ on the CPU, for tests: g++ -std=c++17 -include cuda_cpu.h -x c++ kernel.cu
//
// One block at a time. Every CUDA thread is a fiber with its own stack; a barrier or a warp operation switches to the
// next fiber. Which one is next, and which block, is the order of the launch: ascending, descending, or random from a
// seed. Between barriers a warp runs as far ahead of the others as it can, so that ascending and descending show both
// outcomes of every race between two warps.
//
// What a GPU forbids is an error with its place: barriers that only some threads reach, warp operations with ended or
// unnamed lanes, misaligned vectors, shared memory out of bounds. What a GPU leaves open is garbage: shared memory and
// local variables that nobody wrote, lanes that are not there. Not here: PTX, textures, clusters, cooperative groups; a
// thread that waits in a loop for another one waits forever.
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define GPUEM_EMULATED 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // one block at a time: a static variable belongs to the block
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(gpuem_cpu::machine.shared)

#include "vectors.h"
// in this order
#include "machine.h"
#include "warp.h"
#include "intrinsics.h"
