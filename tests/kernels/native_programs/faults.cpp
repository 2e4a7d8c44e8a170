// Kernels of one block of 64 threads, each with a fault that a GPU may forgive: ./faults <name> <seed> runs one of them.
// Exit code 1 for races; on stdout how many of the results are NaN.
#include <cmath>
#include <cstdio>
#include <map>
#include <string>

#include "native/launch.h"

using namespace stoker;

namespace {

constexpr int kThreads = 64;

struct Params {
  const float *in;
  float *out;
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
const std::map<std::string, void (*)(Params)> kKernels = {
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
  for (int i = 0; i < kThreads; ++i) in[i] = float(i);
  const Params params = {in, out};
  const int seed = atoi(arguments[2]);
  const int code = launch("faulty", kKernels.at(arguments[1]), 1, 1, kThreads, sizeof(Shared),
                          reinterpret_cast<void *>(intptr_t(seed)), params);
  int nans = 0;
  for (float x : out) nans += std::isnan(x);
  printf("%d\n", nans);
  return code != 0;
}
