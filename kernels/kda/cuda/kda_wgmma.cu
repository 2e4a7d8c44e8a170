// arch: sm_90a
// Kimi Delta Attention with the products of whole warpgroups (wgmma), which only Hopper has.
#define STOKER_ISA wgmma
#define STOKER_WARPGROUP
#define STOKER_ENTRY(name) stoker_kda_##name##_wgmma
#include "kda/cuda/kernels.h"
