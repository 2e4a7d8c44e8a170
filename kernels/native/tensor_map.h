// Maps of tensors for copies by boxes (copy_box_async), made by the host and handed to a kernel in its parameters.
#pragma once

#include "native/abi.h"
#include "native/ptx.h"

namespace stoker {

// The sides of a box: a panel of a tile (native/block_tiles.h).
constexpr int kBoxRows = 64, kBoxColumns = 64;

#if defined(STOKER_SIMT)

// What cuTensorMapEncodeTiled asks for and refuses (CUDA driver API 13.0), with the 128-byte swizzle.
inline int encode_map(TensorMap &map, const void *base, const uint64_t (&dims)[3], const uint64_t (&strides)[2],
                      const uint32_t (&box)[3]) {
  bool right = reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] * 2 <= 128 && box[0] * 2 % 16 == 0;
  for (uint64_t dim : dims) right &= dim > 0 && dim <= uint64_t(1) << 32;
  for (uint64_t stride : strides) right &= stride % 16 == 0 && stride < uint64_t(1) << 40;
  for (uint32_t side : box) right &= side > 0 && side <= 256;
  map = {static_cast<const char *>(base), {dims[0], dims[1], dims[2]}, {strides[0], strides[1]}, {box[0], box[1], box[2]},
         true};
  return right ? 0 : kNoTensorMap;
}

#else

// The driver's function is asked for by the runtime, so that a library loads where there is no driver.
inline int encode_map(TensorMap &map, const void *base, const uint64_t (&dims)[3], const uint64_t (&strides)[2],
                      const uint32_t (&box)[3]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    cudaGetLastError();
    return reinterpret_cast<Encode>(found);
  }();
  const cuuint64_t sizes[] = {dims[0], dims[1], dims[2]}, bytes[] = {strides[0], strides[1]};
  const cuuint32_t every[] = {1, 1, 1};
  if (!encode) return kNoTensorMap;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void *>(base), sizes, bytes, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kNoTensorMap;
}

#endif

// Rows of a packed tensor [tokens, columns], `stride` elements apart. Its coordinates are a column, one of the 64 rows that
// end before a token, and that token: a box that starts at row 64 - n has the n rows before the token and then, beyond the
// edge, zeros, where the next sequence's rows lie. Rows and tokens are equally far apart in memory, and the map begins 64
// rows before the tensor, at rows that no box names. 0 or kNoTensorMap.
inline int map_rows(TensorMap &map, const void *at, int64_t stride, int columns, int tokens) {
  const uint64_t bytes = uint64_t(stride) * 2;
  const void *before = reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(at) - kBoxRows * bytes);
  return encode_map(map, before, {uint64_t(columns), kBoxRows, uint64_t(tokens) + 1}, {bytes, bytes},
                    {kBoxColumns, kBoxRows, 1});
}

}  // namespace stoker
