#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "native/sample.h"

template <int kBlock>
__global__ void scale_kernel(ScaleParams p) {
  __shared__ float tile[kBlock];
  for (int64_t i = blockIdx.x * kBlock + threadIdx.x; i < p.n; i += gridDim.x * kBlock) {
    tile[threadIdx.x] = __bfloat162float(__float2bfloat16(p.x[i]));
    p.y[i] = p.factor * tile[threadIdx.x];
  }
}

// Indexed at run time, so it cannot stay in registers, and read inside the loop.
__global__ void local_in_loop_kernel(ScaleParams p) {
  float table[64];
  for (int i = 0; i < 64; ++i) table[i] = p.x[i * threadIdx.x];
  for (int64_t i = 0; i < p.n; ++i) table[(i * 7) & 63] += table[(i + 3) & 63];
  p.y[threadIdx.x] = table[p.n & 63];
}

EXPORT int stoker_abi_version() { return 1; }
EXPORT const char* stoker_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

EXPORT_SIZE(ScaleParams)
EXPORT int sample_scale(const ScaleParams* p) {
  scale_kernel<128><<<2, 128>>>(*p);
  return static_cast<int>(cudaGetLastError());
}

EXPORT int sample_local(const ScaleParams* p) {
  local_in_loop_kernel<<<1, 64>>>(*p);
  return static_cast<int>(cudaGetLastError());
}
