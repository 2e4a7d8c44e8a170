// A thread block on the host: every CUDA thread is a fiber, every instruction of native/ptx.h a few lines of C++.
//
// What it is for: the code that a GPU will run, index by index, is run and checked without one. It is strict where a GPU
// is silently lucky: shared memory and local variables start as NaN, asynchronous copies leave NaN until they are waited
// for, threads run in an order drawn from a seed, and a shared-memory access that races with another thread's since the
// last barrier fails the run and names the two threads. A warpgroup's products read their operands when they are waited
// for, and refuse what was not fenced; their accumulators are NaN until then. Bulk copies land in any order, and not before
// every thread waits for something; until then, and for threads that did not wait for their barrier, to touch where they
// land is a race. Not modelled: memory ordering finer than barriers, timing, warps that diverge.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <vector>

#include "native/number.h"

#define STOKER_DEVICE inline
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

namespace stoker {
namespace simt {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 32 << 10;  // a thread: kernels need 3 KiB, fprintf to stderr 10

struct Copy {
  void *to;
  const void *from;
  int bytes;
  bool valid;
};

// A product of a warpgroup that has been issued and not waited for; `d` is NaN meanwhile.
struct Product {
  float *d;
  int columns;
  uint64_t a, b;
  bool transposed_a, transposed_b;
};

// A bulk copy under way: `land` writes what it brings.
struct Flight {
  size_t to, bytes, barrier;  // in shared memory
  std::function<void()> land;
};
// A barrier of bulk copies. Phases are numbered from 1 over all barriers of a block.
struct Phases {
  int arrivals, missing;
  int64_t bytes;  // announced and not landed; below zero where more landed
  int completed;
  unsigned phase, before;
};

struct Warp {
  // Two sets of mailboxes: a lane can be one collective ahead of another, never two.
  unsigned char mail[2][kLanes][64];
  int arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;  // only to start with: switching by jumps spares a system call each time
  jmp_buf place;
  bool started = false;
  std::vector<Copy> copies;
  std::vector<Product> products;
  std::vector<std::vector<float>> accumulators;  // what a product adds to, if no other waits to be made there first
  std::vector<size_t> unfenced;                   // words written since the last fence_async_proxy
  bool open = false;                              // between warpgroup_begin and warpgroup_end
  std::vector<unsigned> waited;                   // the phases of barriers that it has waited for
  int thread;
  bool done = false;

  bool has_waited(unsigned phase) const { return std::find(waited.rbegin(), waited.rend(), phase) != waited.rend(); }
};

// Who touched four bytes of shared memory since the barrier before last.
struct Access {
  unsigned write_epoch = 0, read_epoch = 0;
  int writer = -1, reader = -1;
  bool fenced = true;  // does what reads shared memory beside the threads see the last write
  bool awaited = false;    // a bulk copy by `writer` will land here
  unsigned landed_in = 0;  // the phase in which one landed in write_epoch, or 0
};

struct Block {
  int x, y, threads;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char *shared;
  size_t shared_bytes;
  std::vector<Access> accesses;
  std::vector<Flight> flights;
  std::map<size_t, Phases> barriers;  // by offset in shared memory
  unsigned phases = 0;
  int arrived = 0;
  unsigned epoch = 1;
  unsigned progress = 0;  // collectives, barriers and phases passed, copies landed
  ucontext_t caller;
  jmp_buf scheduler;
  Fiber *self = nullptr;
  std::function<void()> body;
  const char *kernel;
};

inline thread_local Block *block = nullptr;
inline thread_local int races = 0;
inline thread_local std::vector<char> stacks;  // of a block's threads; kept from block to block

inline void yield() {
  if (!_setjmp(block->self->place)) _longjmp(block->scheduler, 1);
}

// Runs a fiber until it yields or ends.
inline void resume(Fiber &f) {
  block->self = &f;
  if (_setjmp(block->scheduler)) return;
  if (f.started) _longjmp(f.place, 1);
  f.started = true;
  swapcontext(&block->caller, &f.context);
}

[[noreturn]] inline void fail(const char *what) {
  fprintf(stderr, "%s: thread %d: %s\n", block->kernel, block->self->thread, what);
  abort();
}

inline void race(const char *what, ptrdiff_t offset, int other) {
  if (races++ < 10)
    fprintf(stderr, "%s, block (%d, %d): thread %d %s of thread %d, shared byte %td\n", block->kernel, block->x, block->y,
            block->self->thread, what, other, offset);
}

// What is wrong with this thread's reading or writing of four bytes, if anything, and who else had to do with them.
inline const char *conflict(const Access &a, bool write, int &other) {
  const int me = block->self->thread;
  const bool written = a.write_epoch == block->epoch, read = a.read_epoch == block->epoch && a.reader != me;
  other = a.writer;
  if (a.awaited || (written && a.landed_in && !block->self->has_waited(a.landed_in)))
    return write ? "writes over a bulk copy that it has not waited for," : "has not waited for the bulk copy";
  if (written && !a.landed_in && a.writer != me) return write ? "overwrites a value" : "reads a value";
  other = a.reader;
  return write && read ? "overwrites what was read" : nullptr;
}

inline void touch(const void *at, size_t bytes, bool write) {
  ptrdiff_t offset = static_cast<const unsigned char *>(at) - block->shared;
  if (offset < 0 || size_t(offset) + bytes > block->shared_bytes) {
    fprintf(stderr, "%s: thread %d leaves shared memory at byte %td\n", block->kernel, block->self->thread, offset);
    abort();
  }
  const int me = block->self->thread;
  bool told = false;
  for (size_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    Access &a = block->accesses[word];
    int other;
    const char *wrong = told ? nullptr : conflict(a, write, other);
    if (wrong) race(wrong, offset, other);
    told |= wrong != nullptr;
    if (write) {
      a.write_epoch = block->epoch;
      a.writer = me;
      a.fenced = false;
      a.landed_in = 0;
      block->self->unfenced.push_back(word);
    } else if (a.read_epoch != block->epoch || a.reader == me) {
      a.read_epoch = block->epoch;
      a.reader = me;
    } else {
      a.reader = block->threads;  // several: any writer races with one of them
    }
  }
}

// The destination is NaN until the copy is waited for.
inline void begin_copy(const Copy &copy) {
  touch(copy.to, copy.bytes, true);
  memset(copy.to, 0xff, copy.bytes);
  block->self->copies.push_back(copy);
}

inline size_t offset_of(const void *at) { return static_cast<const unsigned char *>(at) - block->shared; }

inline Phases &phases_of(const void *barrier) {
  touch(barrier, 8, false);
  const auto found = block->barriers.find(offset_of(barrier));
  if (found == block->barriers.end()) fail("a barrier that was never made");
  return found->second;
}
inline void settle(Phases &p) {
  if (p.missing || p.bytes) return;
  p.missing = p.arrivals;
  ++p.completed;
  p.before = p.phase;
  p.phase = ++block->phases;
  ++block->progress;
}
inline void begin_flight(void *to, int bytes, const void *barrier, std::function<void()> land) {
  phases_of(barrier);
  if (!block->accesses[offset_of(barrier) / 4].fenced) fail("a bulk copy for a barrier that was not fenced");
  const size_t first = offset_of(to) / 4;
  for (size_t word = first; word < first + bytes / 4 && word < block->accesses.size(); ++word)
    if (!block->accesses[word].fenced) fail("a bulk copy to where a write was not fenced");
  touch(to, bytes, true);
  memset(to, 0xff, bytes);
  for (size_t word = first; word < first + bytes / 4; ++word) block->accesses[word].awaited = true;
  block->flights.push_back({offset_of(to), size_t(bytes), offset_of(barrier), std::move(land)});
}
inline void land(size_t which) {
  const Flight flight = std::move(block->flights[which]);
  block->flights.erase(block->flights.begin() + which);
  flight.land();
  Phases &p = block->barriers.at(flight.barrier);
  for (size_t word = flight.to / 4; word < (flight.to + flight.bytes) / 4; ++word) {
    Access &a = block->accesses[word];
    a.write_epoch = block->epoch;
    a.landed_in = p.phase;
    a.awaited = false;
    a.fenced = true;
  }
  ++block->progress;
  p.bytes -= int64_t(flight.bytes);
  settle(p);
}

inline void entry() {
  block->body();
  if (!block->self->products.empty()) fail("products that nobody waited for");
  block->self->done = true;
  _longjmp(block->scheduler, 1);
}

// Runs the block to its end, fibers in an order drawn anew for every turn.
inline void run(Block &b, unsigned seed) {
  block = &b;
  std::mt19937 generator(seed);
  b.warps = std::vector<Warp>(b.threads / kLanes);
  b.fibers = std::vector<Fiber>(b.threads);
  b.accesses.assign(b.shared_bytes / 4 + 1, Access());
  stacks.assign(b.threads * kStackBytes, '\xff');
  for (int i = 0; i < b.threads; ++i) {
    Fiber &f = b.fibers[i];
    f.thread = i;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks.data() + i * kStackBytes;
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  std::vector<int> warps(b.warps.size());
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = int(i);
  for (int left = b.threads; left;) {
    const unsigned progress = b.progress;
    const int running = left;
    for (size_t i = warps.size(); i > 1; --i) std::swap(warps[i - 1], warps[generator() % i]);
    for (int warp : warps) {
      int first = int(generator() % kLanes), turns = 1 + int(generator() % 64);
      for (unsigned before = b.progress - 1; turns-- && b.progress != before;) {
        before = b.progress;
        for (int l = 0; l < kLanes; ++l) {
          Fiber &f = b.fibers[warp * kLanes + (first + l) % kLanes];
          if (f.done) continue;
          resume(f);
          left -= f.done;
        }
      }
    }
    if (b.progress != progress || left != running) continue;
    if (!b.flights.empty()) {
      land(generator() % b.flights.size());
      continue;
    }
    fprintf(stderr, "%s: %d threads wait for others that never come\n", b.kernel, left);
    for (const auto &[offset, p] : b.barriers)
      fprintf(stderr, "the barrier at byte %zu waits for %d threads and %td bytes\n", offset, p.missing,
              ptrdiff_t(p.bytes));
    abort();
  }
  if (!b.flights.empty()) {
    fprintf(stderr, "%s: bulk copies that nobody waited for\n", b.kernel);
    abort();
  }
  for (int i = 0; i < b.threads; ++i)
    if (stacks[i * kStackBytes] != '\xff') {
      fprintf(stderr, "%s: thread %d needs more than kStackBytes\n", b.kernel, i);
      abort();
    }
  block = nullptr;
}

// Shows every lane's value to the whole warp: returns the mailboxes, good until the warp's next collective but one.
template <class T>
inline const T *exchange(const T &mine) {
  static_assert(sizeof(T) <= 64);
  int thread = block->self->thread, lane = thread % kLanes;
  Warp &warp = block->warps[thread / kLanes];
  unsigned generation = warp.generation;
  T *mail = reinterpret_cast<T *>(warp.mail[generation % 2]);
  mail[lane] = mine;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    ++warp.generation;
    ++block->progress;
  } else {
    while (warp.generation == generation) yield();
  }
  return mail;
}

}  // namespace simt

STOKER_DEVICE int thread_index() { return simt::block->self->thread; }
STOKER_DEVICE int block_x() { return simt::block->x; }
STOKER_DEVICE int block_y() { return simt::block->y; }

STOKER_DEVICE int opaque(int x) { return x; }
STOKER_DEVICE int uniform(int x) { return x; }

STOKER_DEVICE void block_barrier() {
  unsigned epoch = simt::block->epoch;
  if (++simt::block->arrived == simt::block->threads) {
    simt::block->arrived = 0;
    ++simt::block->epoch;
    ++simt::block->progress;
  } else {
    while (simt::block->epoch == epoch) simt::yield();
  }
}

STOKER_DEVICE void warp_barrier() {}
STOKER_DEVICE void trap() {
  fprintf(stderr, "%s: trap\n", simt::block->kernel);
  abort();
}
STOKER_DEVICE uint32_t round_pair(float low, float high) {
  return bf16::round(low) | uint32_t(bf16::round(high)) << 16;
}

STOKER_DEVICE float shuffle(float x, int lane) { return simt::exchange(x)[lane]; }
STOKER_DEVICE float shuffle_xor(float x, int mask) {
  return simt::exchange(x)[(thread_index() % simt::kLanes) ^ mask];
}

template <class T>
STOKER_DEVICE T shared_load(const T *at) {
  simt::touch(at, sizeof(T), false);
  return *at;
}
template <class T>
STOKER_DEVICE void shared_store(T *at, T value) {
  simt::touch(at, sizeof(T), true);
  *at = value;
}

STOKER_DEVICE void copy16_async(void *to, const void *from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fprintf(stderr, "%s: a 16-byte copy is not aligned\n", simt::block->kernel);
    abort();
  }
  simt::begin_copy({to, from, 16, valid});
}
STOKER_DEVICE void copy4_async(void *to, const void *from, bool valid) {
  simt::begin_copy({to, from, 4, valid});
}
STOKER_DEVICE void copy_wait() {
  for (const simt::Copy &copy : simt::block->self->copies) {
    simt::touch(copy.to, copy.bytes, true);
    if (copy.valid)
      memcpy(copy.to, copy.from, copy.bytes);
    else
      memset(copy.to, 0, copy.bytes);
  }
  simt::block->self->copies.clear();
}

using Barrier = uint64_t;

STOKER_DEVICE void barrier_init(Barrier *barrier, int arrivals) {
  simt::touch(barrier, 8, true);
  simt::block->barriers[simt::offset_of(barrier)] = {arrivals, arrivals, 0, 0, ++simt::block->phases, 0};
}
STOKER_DEVICE void barrier_expect(Barrier *barrier, int bytes) { simt::phases_of(barrier).bytes += bytes; }
STOKER_DEVICE void barrier_arrive(Barrier *barrier) {
  simt::Phases &p = simt::phases_of(barrier);
  --p.missing;
  simt::settle(p);
}
STOKER_DEVICE void barrier_wait(Barrier *barrier, int parity) {
  const simt::Phases &p = simt::phases_of(barrier);
  while (p.completed % 2 == parity) simt::yield();
  simt::block->self->waited.push_back(p.before);
}

STOKER_DEVICE void copy_bulk_async(void *to, const void *from, int bytes, Barrier *barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    simt::fail("a bulk copy is not aligned to 16 bytes");
  simt::begin_flight(to, bytes, barrier, [=] { memcpy(to, from, bytes); });
}

// A tensor of 16-bit elements in boxes, as the driver's opaque one describes it (native/tensor_map.h).
struct alignas(64) TensorMap {
  const char *base;
  uint64_t dims[3], strides[2];  // in elements; of rows and planes, in bytes
  uint32_t box[3];
  bool swizzled;
};

STOKER_DEVICE void copy_box_async(void *to, const TensorMap *of, int x, int y, int z, Barrier *barrier) {
  const TensorMap map = *of;
  if (reinterpret_cast<uintptr_t>(to) % 128) simt::fail("a box is not aligned to 128 bytes");
  const int bytes = int(map.box[0] * map.box[1] * map.box[2] * 2);
  simt::begin_flight(to, bytes, barrier, [=] {
    size_t at = simt::offset_of(to);
    for (uint32_t k = 0; k < map.box[2]; ++k)
      for (uint32_t j = 0; j < map.box[1]; ++j)
        for (uint32_t i = 0; i < map.box[0]; ++i, at += 2) {
          const int64_t column = int64_t(x) + i, row = int64_t(y) + j, plane = int64_t(z) + k;
          // Below zero is beyond the end of numbers without a sign.
          const bool inside =
              uint64_t(column) < map.dims[0] && uint64_t(row) < map.dims[1] && uint64_t(plane) < map.dims[2];
          uint16_t element = 0;
          if (inside) memcpy(&element, map.base + column * 2 + row * map.strides[0] + plane * map.strides[1], 2);
          memcpy(simt::block->shared + (map.swizzled ? at ^ (at >> 7 & 7) << 4 : at), &element, 2);
        }
  });
}

template <bool Transposed>
STOKER_DEVICE void load_matrices(uint32_t (&to)[4], const void *row) {
  simt::touch(row, 16, false);
  const void *const *rows = simt::exchange(row);
  int lane = thread_index() % simt::kLanes;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int h = 0; h < 2; ++h) {
      int r = lane / 4, c = lane % 4 * 2 + h;
      if (Transposed) std::swap(r, c);
      pair[h] = static_cast<const uint16_t *>(rows[m * 8 + r])[c];
    }
    to[m] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

STOKER_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands *all = simt::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  int lane = thread_index() % simt::kLanes;
  auto half = [](uint32_t pair, int h) { return bf16::from_bits(h ? pair & 0xffff0000u : pair << 16); };
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int t = 0; t < 16; ++t) {
      float left = half(all[row % 8 * 4 + t % 8 / 2].a[row / 8 + t / 8 * 2], t % 2);
      float right = half(all[column * 4 + t % 8 / 2].b[t / 8], t % 2);
      sum += left * right;
    }
    d[i] += sum;
  }
}

STOKER_DEVICE void fence_async_proxy() {
  for (size_t word : simt::block->self->unfenced)
    if (simt::block->accesses[word].writer == thread_index()) simt::block->accesses[word].fenced = true;
  simt::block->self->unfenced.clear();
}

STOKER_DEVICE uint64_t operand_descriptor(const void *at, int leading, int stride) {
  const uint64_t offset = static_cast<const unsigned char *>(at) - simt::block->shared;
  return offset >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
STOKER_DEVICE void warpgroup_begin() { simt::block->self->open = true; }
STOKER_DEVICE void warpgroup_end() { simt::block->self->open = false; }
STOKER_DEVICE void pin(float &) {}

namespace simt {

// Element (i, t) of an operand, t along the sum: canonical layouts of the 128-byte swizzle.
inline float operand(uint64_t descriptor, bool transposed, int i, int t) {
  if (descriptor >> 62 != 1) fail("an operand is not in the 128-byte swizzle");
  auto bytes = [&](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
  const size_t start = bytes(0), leading = bytes(16), stride = bytes(32);
  size_t at = transposed ? start + i % 64 * 2 + i / 64 * leading + t % 8 * 128 + t / 8 * stride
                         : start + t * 2 + i % 8 * 128 + i / 8 * stride;
  at ^= (at >> 7 & 7) << 4;
  touch(block->shared + at, 2, false);
  if (!block->accesses[at / 4].fenced) fail("a product reads what its writer has not fenced");
  uint16_t bits;
  memcpy(&bits, block->shared + at, 2);
  return bf16::from_bits(uint32_t(bits) << 16);
}

// What a thread reads for its part must be there when a product is issued.
inline void look(const Product &p) {
  for (int t = 0; t < 16; t += p.transposed_a ? 1 : 2) operand(p.a, p.transposed_a, block->self->thread % 64, t);
  for (int t = 0; t < 16; t += p.transposed_b ? 1 : 2) operand(p.b, p.transposed_b, block->self->thread % p.columns, t);
}

// One thread's part of a product.
inline void multiply(const Product &p) {
  const int lane = block->self->thread % kLanes, warp = block->self->thread / kLanes % 4;
  float left[2][16];
  for (int half = 0; half < 2; ++half)
    for (int t = 0; t < 16; ++t) left[half][t] = operand(p.a, p.transposed_a, warp * 16 + lane / 4 + half * 8, t);
  for (int j = 0; j < p.columns / 8; ++j)
    for (int odd = 0; odd < 2; ++odd) {
      float sum[2] = {};
      for (int t = 0; t < 16; ++t) {
        const float right = operand(p.b, p.transposed_b, j * 8 + lane % 4 * 2 + odd, t);
        for (int half = 0; half < 2; ++half) sum[half] += left[half][t] * right;
      }
      for (int half = 0; half < 2; ++half) p.d[j * 4 + half * 2 + odd] += sum[half];
    }
}

}  // namespace simt

template <bool Add, bool TransA, bool TransB, int Tiles>
STOKER_DEVICE void warpgroup_multiply_add(float (&d)[Tiles][4], uint64_t a, uint64_t b) {
  simt::Fiber &self = *simt::block->self;
  if (!self.open) simt::fail("a warpgroup's product outside warpgroup_begin and warpgroup_end");
  constexpr int count = Tiles * 4;
  float *at = reinterpret_cast<float *>(&d);
  bool pending = false;
  for (const simt::Product &product : self.products) pending |= product.d == at;
  std::vector<float> before;
  if (!Add)
    before.assign(count, 0.0f);
  else if (!pending)
    before.assign(at, at + count);
  self.accumulators.push_back(std::move(before));
  self.products.push_back({at, Tiles * 8, a, b, TransA, TransB});
  std::fill(at, at + count, NAN);
  simt::look(self.products.back());
}
// The operands are read as late as they may be.
STOKER_DEVICE void warpgroup_wait() {
  simt::Fiber &self = *simt::block->self;
  if (self.open) simt::fail("a wait for products that were not committed");
  for (size_t i = 0; i < self.products.size(); ++i) {
    const std::vector<float> &before = self.accumulators[i];
    if (!before.empty()) memcpy(self.products[i].d, before.data(), before.size() * sizeof(float));
    simt::multiply(self.products[i]);
  }
  self.products.clear();
  self.accumulators.clear();
}

STOKER_DEVICE float exponential2(float x) { return std::exp2(x); }

}  // namespace stoker
