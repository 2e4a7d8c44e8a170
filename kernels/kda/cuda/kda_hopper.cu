// arch: sm_90a
// Kimi Delta Attention with the products of whole warpgroups (wgmma), which only Hopper has.
#define STOKER_ISA hopper
#define STOKER_WARPGROUP
#define STOKER_ENTRY(name) stoker_kda_##name##_hopper
#include "kda/cuda/kernels.h"
