// arch: sm_90a
// The gated delta rule with the products of whole warpgroups (wgmma), which only Hopper has.
#define STOKER_ISA wgmma
#define STOKER_WARPGROUP
#define STOKER_ENTRY(name) stoker_gated_delta_##name##_wgmma
#include "gated_delta/cuda/kernels.h"
