// The floating-point mode that host kernels run in.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace stoker {

// While it lives, this thread reads and writes subnormal numbers as zero. Decays make states of them, an operation that
// meets one is a trap into microcode (KDA with decays of e^-20 a token took five times as long), and beside any number
// that matters they are nothing.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(mode()) { set_mode(before_ | kFlush); }
  FlushSubnormals(const FlushSubnormals &) = delete;
  ~FlushSubnormals() { set_mode(before_); }

 private:
#if defined(__x86_64__)
  using Mode = uint32_t;
  static constexpr Mode kFlush = 0x8040;  // MXCSR: flush to zero, denormals are zero
  static Mode mode() { return _mm_getcsr(); }
  static void set_mode(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kFlush = 1 << 24;  // FPCR.FZ, for both
  static Mode mode() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  using Mode = int;
  static constexpr Mode kFlush = 0;
  static Mode mode() { return 0; }
  static void set_mode(Mode) {}
#endif
  const Mode before_;
};

}  // namespace stoker
