#if !defined(STOKER_SIMT)
#include <cuda_runtime.h>
#endif

#include "native/abi_functions.h"
