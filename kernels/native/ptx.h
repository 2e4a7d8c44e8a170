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

#include <cuda.h>
#include <cuda_runtime.h>

#define STOKER_DEVICE __device__ __forceinline__

namespace stoker {

STOKER_DEVICE int thread_index() { return threadIdx.x; }
STOKER_DEVICE int block_x() { return blockIdx.x; }
STOKER_DEVICE int block_y() { return blockIdx.y; }

// x >= 0, of which the compiler knows no more: what is derived from it is computed here, not kept from elsewhere.
STOKER_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  __builtin_assume(x >= 0);
  return x;
}

// x, which is the same in all lanes: the compiler may keep it, and what follows from it, once for a warp.
STOKER_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

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

// A barrier in shared memory that bulk copies complete (PTX ISA 9.0, "mbarrier"). A phase is over once `arrivals` threads
// have arrived and all bytes that were announced have landed; the next has the other parity, the first has 0. While an
// arrival is missing, bytes may land before they are announced.
using Barrier = uint64_t;

// Others may use it after a block's barrier.
STOKER_DEVICE void barrier_init(Barrier *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
STOKER_DEVICE void barrier_expect(Barrier *barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
STOKER_DEVICE void barrier_arrive(Barrier *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for the end of the phase of a parity, the current one or the one before, and sees what landed in it. A try lasts as
// long as the device likes; after so many that no copy can still be under way the kernel ends rather than hangs.
STOKER_DEVICE void barrier_wait(Barrier *barrier, int parity) {
  for (int tries = 0;; ++tries) {
    uint32_t over;
    asm volatile(
        "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over; }"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (over) return;
    if (tries == 1 << 24) trap();
  }
}

// Copies begun by one thread for all, which know nothing of threads: what these wrote where they land must be fenced
// (fence_async_proxy) and a barrier ago. `bytes` from global to shared memory, all multiples of 16.
STOKER_DEVICE void copy_bulk_async(void *to, const void *from, int bytes, Barrier *barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// The box of a tensor that starts at (x, y, z), zeros where it leaves the tensor; all bytes of it count. `to`: a multiple of
// 128 bytes. `of` lies in the kernel's parameters.
using TensorMap = CUtensorMap;
STOKER_DEVICE void copy_box_async(void *to, const TensorMap *of, int x, int y, int z, Barrier *barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(of), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
      : "memory");
}

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

// Writes to shared memory made so far become visible to what reads it beside the threads (wgmma).
STOKER_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#if defined(STOKER_WARPGROUP)
// Products of four warps, d [64, N] += a [64, 16] b [16, N], both operands in shared memory (PTX ISA 9.0, "Asynchronous
// warpgroup-level matrix multiply-accumulate"). Thread t has of d what mma.m16n8k16 gives it in warp t / 32's 16 rows.
// Asynchronous: accumulators and operands may be touched again after warpgroup_wait.
//
// The descriptor of an operand in the 128-byte swizzle that starts at `at`, of which 8 rows of 128 bytes make an atom.
// `stride`: bytes from an atom to the next along the rows. `leading`: from a panel of 64 columns to the next, read only
// where the operand is transposed, its columns being what is not summed over.
STOKER_DEVICE uint64_t operand_descriptor(const void *at, int leading, int stride) {
  return uint64_t(shared_address(at) >> 4 & 0x3fff) | uint64_t(leading >> 4 & 0x3fff) << 16 |
         uint64_t(stride >> 4 & 0x3fff) << 32 | uint64_t(1) << 62;
}
STOKER_DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
STOKER_DEVICE void warpgroup_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
STOKER_DEVICE void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// The compiler neither reads nor writes x across this.
STOKER_DEVICE void pin(float &x) { asm volatile("" : "+f"(x)::"memory"); }

#define STOKER_D(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define STOKER_D4(j) STOKER_D(j), STOKER_D(j + 1), STOKER_D(j + 2), STOKER_D(j + 3)
// `Add` false: d = a b.
template <bool Add, bool TransA, bool TransB>
STOKER_DEVICE void warpgroup_multiply_add(float (&d)[4][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "%16, %17, add, 1, 1, %19, %20; }"
      : STOKER_D4(0)
      : "l"(a), "l"(b), "n"(Add), "n"(TransA), "n"(TransB));
}
template <bool Add, bool TransA, bool TransB>
STOKER_DEVICE void warpgroup_multiply_add(float (&d)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31}, "
      "%32, %33, add, 1, 1, %35, %36; }"
      : STOKER_D4(0), STOKER_D4(4)
      : "l"(a), "l"(b), "n"(Add), "n"(TransA), "n"(TransB));
}
template <bool Add, bool TransA, bool TransB>
STOKER_DEVICE void warpgroup_multiply_add(float (&d)[16][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"
      "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "%64, %65, add, 1, 1, %67, %68; }"
      : STOKER_D4(0), STOKER_D4(4), STOKER_D4(8), STOKER_D4(12)
      : "l"(a), "l"(b), "n"(Add), "n"(TransA), "n"(TransB));
}
#undef STOKER_D4
#undef STOKER_D
#endif

STOKER_DEVICE float exponential2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace stoker
#endif
