// The few machine instructions that device kernels use, each as a function of the thread that runs it.
//
// Compiled by nvcc they are PTX. Compiled as C++ with -DSTOKER_SIMT they are the same operations on the emulated block of
// native/simt.h, so that the very code of a kernel runs, and is checked, where there is no GPU. Fragment layouts are those
// of the PTX ISA 9.0, sections "Matrix fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include "native/number.h"

#if defined(STOKER_SIMT)
#include "native/simt.h"
#else

#include <cuda_runtime.h>

#define STOKER_DEVICE __device__ __forceinline__

namespace stoker {

STOKER_DEVICE int thread_index() { return threadIdx.x; }
STOKER_DEVICE int block_x() { return blockIdx.x; }
STOKER_DEVICE int block_y() { return blockIdx.y; }

// x, of which the compiler knows nothing: what is derived from it is computed here, not kept in registers from elsewhere.
STOKER_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

STOKER_DEVICE uint32_t shared_address(const void *at) { return uint32_t(__cvta_generic_to_shared(at)); }

STOKER_DEVICE void block_barrier() { __syncthreads(); }

// Ends the kernel with an error that every later call of this device reports.
STOKER_DEVICE void trap() { __trap(); }

// Lanes that parted meet again: what `.aligned` instructions below ask for.
STOKER_DEVICE void warp_barrier() { __syncwarp(); }

// Two numbers rounded to bfloat16, the first in the low half.
STOKER_DEVICE uint32_t round_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

STOKER_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
STOKER_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Loads and stores of shared memory by one thread.
template <class T>
STOKER_DEVICE T shared_load(const T *at) {
  return *at;
}
template <class T>
STOKER_DEVICE void shared_store(T *at, T value) {
  *at = value;
}

// 16 (or 4) bytes from global to shared memory, zeros instead where `valid` is false; done after copy_wait and a barrier.
STOKER_DEVICE void copy16_async(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
STOKER_DEVICE void copy4_async(void *to, const void *from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
STOKER_DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
template <bool Transposed>
STOKER_DEVICE void load_matrices(uint32_t (&to)[4], const void *row) {
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], bfloat16 operands, float sums.
STOKER_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

STOKER_DEVICE float exponential2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace stoker
#endif
