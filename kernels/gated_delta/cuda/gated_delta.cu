// The gated delta rule on any GPU the kernels are built for.
#define STOKER_ISA cuda
#define STOKER_ENTRY(name) stoker_gated_delta_##name
#include "gated_delta/cuda/kernels.h"

STOKER_PARAMS(DeltaParams)
