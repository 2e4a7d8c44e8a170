// How an entry point of the device library starts a kernel. No allocation, no synchronisation: safe in a CUDA graph.
#pragma once

#include "native/ptx.h"

namespace stoker {

// Bytes of shared memory of a block; at most 227 KiB on compute capability 9.0 and 10.x (CUDA C++ programming guide).
template <class Shared>
constexpr size_t shared_bytes() {
  static_assert(sizeof(Shared) <= 227 * 1024);
  return sizeof(Shared);
}

}  // namespace stoker

#if defined(STOKER_SIMT)

#include <vector>

namespace stoker {

// Shared memory of the running block, full of NaN at the start.
template <class Shared>
Shared &shared_memory() {
  return *reinterpret_cast<Shared *>(simt::block->shared);
}

// The blocks run one after the other; `stream` carries the seed of their order and of their threads' order.
template <class Kernel, class Params>
int launch(const char *name, Kernel *kernel, int grid_x, int grid_y, int threads, size_t shared, void *stream,
           const Params &params) {
  if (grid_y > 65535) return 9;  // cudaErrorInvalidConfiguration
  const unsigned seed = unsigned(reinterpret_cast<uintptr_t>(stream));
  std::vector<unsigned char> memory(shared + 1024);
  unsigned char *aligned = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024);
  simt::races = 0;
  for (int i = 0; i < grid_x * grid_y; ++i) {
    const int at = seed % 2 ? i : grid_x * grid_y - 1 - i;
    memset(aligned, 0xff, shared);
    simt::Block block;
    block.x = at % grid_x;
    block.y = at / grid_x;
    block.threads = threads;
    block.shared = aligned;
    block.shared_bytes = shared;
    block.kernel = name;
    block.body = [&] { kernel(params); };
    simt::run(block, seed + i);
  }
  return simt::races ? -simt::races : 0;
}

}  // namespace stoker

#else

namespace stoker {

template <class Shared>
STOKER_DEVICE Shared &shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return *reinterpret_cast<Shared *>(memory);
}

template <class Kernel, class Params>
int launch(const char *, Kernel *kernel, int grid_x, int grid_y, int threads, size_t shared, void *stream,
           const Params &params) {
  if (grid_x == 0 || grid_y == 0) return 0;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess) {
    void *arguments[] = {const_cast<Params *>(&params)};
    error = cudaLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(grid_x, grid_y), dim3(threads), arguments, shared,
                             static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) cudaGetLastError();  // it is told by the return value, not to whoever asks next
  return int(error);
}

}  // namespace stoker

#endif
