// Kernels of one block of 64 threads, each with a fault that a GPU may forgive: ./faults <name> <seed> runs one of them.
// Exit code 1 for races; on stdout how many of the results are NaN.
#include <cmath>
#include <cstdio>
#include <map>
#include <string>

#include "native/launch.h"
#include "native/tensor_map.h"

using namespace stoker;

namespace {

constexpr int kThreads = 64;

struct Params {
  const float *in;
  float *out;
  const uint16_t *rows;  // [64, 64]
  TensorMap map;         // of these
};
struct Shared {
  alignas(16) float x[2 * kThreads];
};

float *shared() { return shared_memory<Shared>().x; }
int me() { return thread_index(); }
int next() { return (me() + 1) % kThreads; }
int previous() { return (me() + kThreads - 1) % kThreads; }

void exchange(Params p, bool first_barrier, bool second_barrier) {
  for (int round = 0; round < 2; ++round) {
    shared_store(shared() + me(), p.in[me()] + round);
    if (first_barrier) block_barrier();
    p.out[me()] = shared_load(shared() + next());
    if (second_barrier) block_barrier();
  }
}
void none(Params p) { exchange(p, true, true); }
void read_too_early(Params p) { exchange(p, false, true); }
void overwritten_too_early(Params p) { exchange(p, true, false); }
void two_writers(Params p) {
  shared_store(shared() + me() / 2, p.in[me()]);
  block_barrier();
  p.out[me()] = shared_load(shared() + me() / 2);
}

void copied(Params p, bool wait, bool barrier) {
  copy4_async(shared() + me(), p.in + me(), true);
  if (wait) copy_wait();
  if (barrier) block_barrier();
  p.out[me()] = shared_load(shared() + previous());
}
void copy(Params p) { copied(p, true, true); }
void copy_without_wait(Params p) { copied(p, false, true); }
void copy_without_barrier(Params p) { copied(p, true, false); }
// What a copy in flight will overwrite is read by its own thread, then waited for.
void read_under_a_copy(Params p) {
  shared_store(shared() + me(), p.in[me()]);
  copy4_async(shared() + me(), p.in + me(), true);
  p.out[me()] = shared_load(shared() + me());
  copy_wait();
}
void misaligned_copy(Params p) { copy16_async(shared() + 4 * (me() / 8) + 1, p.in, true); }
void misaligned_source(Params p) { copy16_async(shared(), p.in + 1, true); }

void outside(Params p) { p.out[me()] = shared_load(shared() + me() + 2 * kThreads - 8); }
void before(Params p) { p.out[me()] = shared_load(shared() + me() - 1); }
void uninitialised_shared(Params p) { p.out[me()] = shared_load(shared() + me()); }
void uninitialised_local(Params p) {
  volatile float local[4];
  p.out[me()] = local[me() % 4];
}

void barrier_of_a_half(Params p) {
  p.out[me()] = 0;
  if (me() < kThreads / 2) block_barrier();
}
void shuffle_of_a_half(Params p) {
  p.out[me()] = me() % 32 < 16 ? shuffle(p.in[me()], 0) : 0;
}

// A warpgroup's product of zeros, [64, 16] by [16, 32], in the steps that it needs.
struct Operands {
  alignas(1024) uint16_t a[64 * 64];
  uint16_t b[64 * 64];
};
struct Steps {
  bool fence = true, barrier = true, begin = true, wait = true, swizzled = true;
};
void multiplied(Params p, Steps steps) {
  auto &s = shared_memory<Operands>();
  for (int c = 0; c < 64; ++c) {
    shared_store(s.a + me() * 64 + c, uint16_t(0));
    shared_store(s.b + me() * 64 + c, uint16_t(0));
  }
  if (steps.fence) fence_async_proxy();
  if (steps.barrier) block_barrier();
  float d[4][4] = {};
  const uint64_t swizzle = steps.swizzled ? 0 : uint64_t(1) << 62;
  if (steps.begin) warpgroup_begin();
  warpgroup_multiply_add<true, false, false>(d, operand_descriptor(s.a, 0, 1024) ^ swizzle, operand_descriptor(s.b, 0, 1024));
  warpgroup_end();
  if (steps.wait) warpgroup_wait();
  p.out[me()] = d[0][0];
  warpgroup_wait();
}
Steps without(bool Steps::*step) {
  Steps steps;
  steps.*step = false;
  return steps;
}
void product(Params p) { multiplied(p, Steps()); }
void product_without_fence(Params p) { multiplied(p, without(&Steps::fence)); }
void product_without_barrier(Params p) { multiplied(p, without(&Steps::barrier)); }
void product_without_begin(Params p) { multiplied(p, without(&Steps::begin)); }
void product_without_wait(Params p) { multiplied(p, without(&Steps::wait)); }
void product_of_another_layout(Params p) { multiplied(p, without(&Steps::swizzled)); }
void product_left_behind(Params p) {
  auto &s = shared_memory<Operands>();
  shared_store(s.a, uint16_t(0));
  float d[4][4];
  warpgroup_begin();
  warpgroup_multiply_add<false, false, false>(d, operand_descriptor(s.a, 0, 1024), operand_descriptor(s.b, 0, 1024));
  warpgroup_end();
  p.out[me()] = 0;
}
// The operand is overwritten, behind a barrier, before the product was waited for.
void operand_overwritten(Params p) {
  auto &s = shared_memory<Operands>();
  for (int c = 0; c < 64; ++c) {
    shared_store(s.a + me() * 64 + c, bf16(1).bits);
    shared_store(s.b + me() * 64 + c, bf16(1).bits);
  }
  fence_async_proxy();
  block_barrier();
  float d[4][4];
  warpgroup_begin();
  warpgroup_multiply_add<false, false, false>(d, operand_descriptor(s.a, 0, 1024), operand_descriptor(s.b, 0, 1024));
  warpgroup_end();
  block_barrier();
  for (int c = 0; c < 64; ++c) shared_store(s.a + me() * 64 + c, bf16(NAN).bits);
  fence_async_proxy();
  block_barrier();
  warpgroup_wait();
  p.out[me()] = d[0][0];
}

// A box of 64 x 64 elements that comes by a bulk copy to where every thread wrote, in the steps that it needs.
struct Landing {
  alignas(1024) uint16_t box[64 * 64];
  uint16_t beside[64];
  Barrier landed;
};
struct BulkSteps {
  bool make = true, fence = true, barrier = true, arrive = true, wait = true, wait_all = true;
  bool unswizzled = false, overwrite = false, aligned = true;
  int announced = 64 * 64 * 2, parity = 0;
};
void bulk(Params p, BulkSteps steps) {
  auto &s = shared_memory<Landing>();
  p.map.swizzled = !steps.unswizzled;
  if (me() == 0 && steps.make) barrier_init(&s.landed, 1);
  fence_async_proxy();
  block_barrier();
  for (int c = 0; c < 64; ++c) shared_store(s.box + me() * 64 + c, bf16(1).bits);
  if (steps.fence) fence_async_proxy();
  if (steps.barrier) block_barrier();
  if (me() == 0) {
    barrier_expect(&s.landed, steps.announced);
    copy_box_async(s.box + (steps.aligned ? 0 : 8), &p.map, 0, 0, 64, &s.landed);
    if (steps.arrive) barrier_arrive(&s.landed);
  }
  if (me() == 5 && steps.overwrite) {
    shared_store(s.box, bf16(2).bits);
    fence_async_proxy();
  }
  if (steps.wait && (steps.wait_all || me() != 7)) barrier_wait(&s.landed, steps.parity);
  const uint16_t found = shared_load(s.box + me() * 64 + (me() % 8) * 8);
  p.out[me()] = found == p.rows[me() * 64] ? 0 : NAN;
  barrier_wait(&s.landed, 0);
}
template <class T>
BulkSteps but(T BulkSteps::*step, T value) {
  BulkSteps steps;
  steps.*step = value;
  return steps;
}
void bulk(Params p) { bulk(p, BulkSteps()); }
void bulk_without_barrier(Params p) { bulk(p, but(&BulkSteps::barrier, false)); }
void bulk_without_wait(Params p) { bulk(p, but(&BulkSteps::wait, false)); }
void bulk_without_wait_of_one(Params p) { bulk(p, but(&BulkSteps::wait_all, false)); }
void bulk_of_the_other_parity(Params p) { bulk(p, but(&BulkSteps::parity, 1)); }
void bulk_overwritten(Params p) { bulk(p, but(&BulkSteps::overwrite, true)); }
void bulk_without_swizzle(Params p) { bulk(p, but(&BulkSteps::unswizzled, true)); }
void bulk_of_more_than_announced(Params p) { bulk(p, but(&BulkSteps::announced, 64 * 64 * 2 - 16)); }
void bulk_of_less_than_announced(Params p) { bulk(p, but(&BulkSteps::announced, 64 * 64 * 2 + 16)); }
void bulk_without_arrival(Params p) { bulk(p, but(&BulkSteps::arrive, false)); }
void bulk_over_an_unfenced_write(Params p) { bulk(p, but(&BulkSteps::fence, false)); }
void bulk_for_an_unfenced_barrier(Params p) {
  auto &s = shared_memory<Landing>();
  if (me() == 0) barrier_init(&s.landed, 1);
  block_barrier();
  if (me() == 0) copy_bulk_async(s.box, p.rows, 64, &s.landed);
}
void bulk_for_no_barrier(Params p) { bulk(p, but(&BulkSteps::make, false)); }
void bulk_misaligned(Params p) { bulk(p, but(&BulkSteps::aligned, false)); }
void bulk_left_behind(Params p) {
  auto &s = shared_memory<Landing>();
  if (me() == 0) {
    barrier_init(&s.landed, 1);
    fence_async_proxy();
    barrier_expect(&s.landed, 64);
    copy_bulk_async(s.box, p.rows, 64, &s.landed);
  }
  p.out[me()] = 0;
}
// Two phases, of which the second brings what a thread that counts wrongly takes for the first.
void bulk_read_a_phase_early(Params p) {
  auto &s = shared_memory<Landing>();
  if (me() == 0) barrier_init(&s.landed, 1);
  fence_async_proxy();
  block_barrier();
  for (int phase = 0; phase < 2; ++phase) {
    if (me() == 0) {
      barrier_expect(&s.landed, 128);
      copy_bulk_async(phase ? s.beside : s.box, p.rows, 128, &s.landed);
      barrier_arrive(&s.landed);
    }
    barrier_wait(&s.landed, 0);
  }
  p.out[me()] = shared_load(s.beside + me()) == p.rows[me()] ? 0 : NAN;
  barrier_wait(&s.landed, 1);
}

const std::map<std::string, void (*)(Params)> kKernels = {
    {"bulk", bulk},
    {"bulk without barrier", bulk_without_barrier},
    {"bulk without wait", bulk_without_wait},
    {"bulk without wait of one", bulk_without_wait_of_one},
    {"bulk of the other parity", bulk_of_the_other_parity},
    {"bulk read a phase early", bulk_read_a_phase_early},
    {"bulk overwritten", bulk_overwritten},
    {"bulk without swizzle", bulk_without_swizzle},
    {"bulk of more than announced", bulk_of_more_than_announced},
    {"bulk of less than announced", bulk_of_less_than_announced},
    {"bulk without arrival", bulk_without_arrival},
    {"bulk over an unfenced write", bulk_over_an_unfenced_write},
    {"bulk for an unfenced barrier", bulk_for_an_unfenced_barrier},
    {"bulk for no barrier", bulk_for_no_barrier},
    {"bulk misaligned", bulk_misaligned},
    {"bulk left behind", bulk_left_behind},
    {"product", product},
    {"product without fence", product_without_fence},
    {"product without barrier", product_without_barrier},
    {"product without begin", product_without_begin},
    {"product without wait", product_without_wait},
    {"product of another layout", product_of_another_layout},
    {"product left behind", product_left_behind},
    {"operand overwritten", operand_overwritten},
    {"none", none},
    {"read too early", read_too_early},
    {"overwritten too early", overwritten_too_early},
    {"two writers", two_writers},
    {"copy", copy},
    {"copy without wait", copy_without_wait},
    {"copy without barrier", copy_without_barrier},
    {"read under a copy", read_under_a_copy},
    {"misaligned copy", misaligned_copy},
    {"misaligned source", misaligned_source},
    {"outside", outside},
    {"before", before},
    {"uninitialised shared", uninitialised_shared},
    {"uninitialised local", uninitialised_local},
    {"barrier of a half", barrier_of_a_half},
    {"shuffle of a half", shuffle_of_a_half},
};

}  // namespace

int main(int, char **arguments) {
  alignas(16) float in[kThreads], out[kThreads];
  alignas(16) uint16_t rows[64 * 64];
  for (int i = 0; i < kThreads; ++i) in[i] = float(i);
  for (int i = 0; i < 64 * 64; ++i) rows[i] = uint16_t(i * 7 + 3);
  Params params = {in, out, rows, {}};
  map_rows(params.map, rows, 64, 64, 64);
  const int seed = atoi(arguments[2]);
  const std::string name = arguments[1];
  auto begins = [&](const char *word) { return name.find(word) == 0; };
  const size_t bytes = begins("bulk")                            ? sizeof(Landing)
                       : begins("product") || begins("operand") ? sizeof(Operands)
                                                                 : sizeof(Shared);
  const int code =
      launch("faulty", kKernels.at(name), 1, 1, kThreads, bytes, reinterpret_cast<void *>(intptr_t(seed)), params);
  int nans = 0;
  for (float x : out) nans += std::isnan(x);
  printf("%d\n", nans);
  return code != 0;
}
