// Kimi Delta Attention on any GPU the kernels are built for.
#define STOKER_ISA cuda
#define STOKER_ENTRY(name) stoker_kda_##name
#include "kda/cuda/kernels.h"

STOKER_PARAMS(DeltaParams)
