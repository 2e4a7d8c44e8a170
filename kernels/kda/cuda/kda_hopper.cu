// arch: sm_90a
// Kimi Delta Attention with all that Hopper has: the products of whole warpgroups (wgmma) and bulk copies (TMA).
#define STOKER_ISA hopper
#define STOKER_WARPGROUP
#define STOKER_TMA
#define STOKER_ENTRY(name) stoker_kda_##name##_hopper
#include "kda/cuda/kernels.h"
