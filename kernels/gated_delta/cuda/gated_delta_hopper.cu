// arch: sm_90a
// The gated delta rule with the products of whole warpgroups (wgmma), which only Hopper has.
#define STOKER_ISA hopper
#define STOKER_WARPGROUP
#define STOKER_ENTRY(name) stoker_gated_delta_##name##_hopper
#include "gated_delta/cuda/kernels.h"
