// A thread block on the host: every CUDA thread is a fiber, every instruction of native/ptx.h a few lines of C++.
//
// What it is for: the code that a GPU will run, index by index, is run and checked without one. It is strict where a GPU
// is silently lucky: shared memory and local variables start as NaN, asynchronous copies leave NaN until they are waited
// for, threads run in an order drawn from a seed, and a shared-memory access that races with another thread's since the
// last barrier fails the run and names the two threads. Not modelled: memory ordering finer than barriers, timing, warps that diverge.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "native/number.h"

#define STOKER_DEVICE inline
#define __global__
#define __device__
#define __launch_bounds__(...)

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
  int thread;
  bool done = false;
};

// Who touched four bytes of shared memory since the barrier before last.
struct Access {
  unsigned write_epoch = 0, read_epoch = 0;
  int writer = -1, reader = -1;
};

struct Block {
  int x, y, threads;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char *shared;
  size_t shared_bytes;
  std::vector<Access> accesses;
  int arrived = 0;
  unsigned epoch = 1;
  unsigned progress = 0;  // collectives and barriers passed
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

inline void race(const char *what, ptrdiff_t offset, int other) {
  if (races++ < 10)
    fprintf(stderr, "%s, block (%d, %d): thread %d %s of thread %d, shared byte %td\n", block->kernel, block->x, block->y,
            block->self->thread, what, other, offset);
}

inline void touch(const void *at, size_t bytes, bool write) {
  ptrdiff_t offset = static_cast<const unsigned char *>(at) - block->shared;
  if (offset < 0 || size_t(offset) + bytes > block->shared_bytes) {
    fprintf(stderr, "%s: thread %d leaves shared memory at byte %td\n", block->kernel, block->self->thread, offset);
    abort();
  }
  int me = block->self->thread;
  for (size_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    Access &a = block->accesses[word];
    bool written = a.write_epoch == block->epoch && a.writer != me;
    bool read = a.read_epoch == block->epoch && a.reader != me;
    if (written) race(write ? "overwrites a value" : "reads a value", offset, a.writer);
    if (write && read) race("overwrites what was read", offset, a.reader);
    if (write) {
      a.write_epoch = block->epoch;
      a.writer = me;
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

inline void entry() {
  block->body();
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
    if (b.progress == progress && left == running) {
      fprintf(stderr, "%s: %d threads wait for others that never come\n", b.kernel, left);
      abort();
    }
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

STOKER_DEVICE float exponential2(float x) { return std::exp2(x); }

}  // namespace stoker
