// arch: sm_90a
// The gated delta rule with all that Hopper has: the products of whole warpgroups (wgmma) and bulk copies (TMA).
#define STOKER_ISA hopper
#define STOKER_WARPGROUP
#define STOKER_TMA
#define STOKER_ENTRY(name) stoker_gated_delta_##name##_hopper
#include "gated_delta/cuda/kernels.h"
