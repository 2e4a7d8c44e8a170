// One warp and the instructions of native/ptx.h: lanes take their operands from, and leave their results in, plain arrays.
#include "native/abi.h"
#include "native/launch.h"
#include "native/tensor_map.h"

using namespace stoker;

namespace {

struct Fragments {
  const uint32_t *a, *b;  // [32, 4], [32, 2]
  float *d;               // [32, 4]
};
void multiply_kernel(Fragments p) {
  const int lane = thread_index();
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[lane * 4 + i], d[i] = p.d[lane * 4 + i];
  multiply_add(d, a, p.b[lane * 2], p.b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) p.d[lane * 4 + i] = d[i];
}

struct Matrices {
  const uint16_t *from;  // [32 rows, 8]: row l is named by lane l
  uint32_t *to;          // [32, 4]
  int transposed;
};
struct MatrixRows {
  alignas(16) uint16_t rows[32][8];
};
void load_kernel(Matrices p) {
  const int lane = thread_index();
  auto &s = shared_memory<MatrixRows>();
  copy16_async(s.rows[lane], p.from + lane * 8, true);
  copy_wait();
  block_barrier();
  uint32_t to[4];
  if (p.transposed)
    load_matrices<true>(to, s.rows[lane]);
  else
    load_matrices<false>(to, s.rows[lane]);
  for (int i = 0; i < 4; ++i) p.to[lane * 4 + i] = to[i];
}

struct Shuffles {
  const float *from;  // [32]
  float *to;          // [32, 2]: of lane 31 - l, of lane l ^ 5
};
void shuffle_kernel(Shuffles p) {
  const int lane = thread_index();
  p.to[lane * 2] = shuffle(p.from[lane], 31 - lane);
  p.to[lane * 2 + 1] = shuffle_xor(p.from[lane], 5);
}

struct Copies {
  const float *from;  // [32, 4]
  float *to;          // [64, 4]: rows 0-31 by copies of 16 bytes, 32-63 by copies of 4
  int valid;          // lanes from here on copy zeros
};
struct CopiedRows {
  alignas(16) float rows[64][4];
};
void copy_kernel(Copies p) {
  const int lane = thread_index();
  auto &s = shared_memory<CopiedRows>();
  copy16_async(s.rows[lane], p.from + lane * 4, lane < p.valid);
  for (int i = 0; i < 4; ++i) copy4_async(s.rows[32 + lane] + i, p.from + lane * 4 + i, lane < p.valid);
  copy_wait();
  for (int row = lane; row < 64; row += 32)
    for (int i = 0; i < 4; ++i) p.to[row * 4 + i] = shared_load(s.rows[row] + i);
}

// A box of [16, 64] as it lies in shared memory.
struct Boxes {
  TensorMap map;
  uint16_t *to;
  int x, y, z;
};
struct Box {
  alignas(1024) uint16_t elements[16 * 64];
  Barrier landed;
};
void box_kernel(Boxes p) {
  auto &s = shared_memory<Box>();
  if (thread_index() == 0) {
    barrier_init(&s.landed, 1);
    fence_async_proxy();
    barrier_expect(&s.landed, sizeof s.elements);
    copy_box_async(s.elements, &p.map, p.x, p.y, p.z, &s.landed);
    barrier_arrive(&s.landed);
  }
  block_barrier();
  barrier_wait(&s.landed, 0);
  for (int i = thread_index(); i < 16 * 64; i += 32) p.to[i] = shared_load(s.elements + i);
}

}  // namespace

STOKER_EXPORT int run_box(const uint16_t *tensor, uint16_t *to, int x, int y, int z) {
  Boxes p = {{}, to, x, y, z};
  if (int error = encode_map(p.map, tensor, {96, 9, 3}, {96 * 2, 9 * 96 * 2}, {64, 16, 1})) return error;
  return launch("box", box_kernel, 1, 1, 32, sizeof(Box), (void *)3, p);
}
STOKER_EXPORT int run_encode(uint64_t base, uint64_t columns, uint64_t stride, uint64_t rows, uint64_t wide) {
  TensorMap map;
  return encode_map(map, reinterpret_cast<const void *>(base), {columns, 64, 100}, {stride, stride},
                    {uint32_t(wide), uint32_t(rows), 1});
}

STOKER_EXPORT int run_multiply(const uint32_t *a, const uint32_t *b, float *d) {
  return launch("multiply", multiply_kernel, 1, 1, 32, 0, (void *)3, Fragments{a, b, d});
}
STOKER_EXPORT int run_load(const uint16_t *from, uint32_t *to, int transposed) {
  return launch("load", load_kernel, 1, 1, 32, sizeof(MatrixRows), (void *)3, Matrices{from, to, transposed});
}
STOKER_EXPORT int run_shuffle(const float *from, float *to) {
  return launch("shuffle", shuffle_kernel, 1, 1, 32, 0, (void *)3, Shuffles{from, to});
}
STOKER_EXPORT int run_copy(const float *from, float *to, int valid) {
  return launch("copy", copy_kernel, 1, 1, 32, sizeof(CopiedRows), (void *)3, Copies{from, to, valid});
}

STOKER_EXPORT void round_all(const float *from, uint16_t *to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = bf16(from[i]).bits;
}
STOKER_EXPORT void widen_all(const uint16_t *from, float *to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bf16 x;
    x.bits = from[i];
    to[i] = x;
  }
}
