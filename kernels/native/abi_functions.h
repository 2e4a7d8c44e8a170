// The functions of native/abi.h: included once by each library.
#include "native/abi.h"

STOKER_EXPORT int stoker_abi_version() { return stoker::kAbiVersion; }

STOKER_EXPORT const char *stoker_error_text(int code) {
  if (code == stoker::kUnsupported) return "not built for these head dims";
  if (code == stoker::kWorkspaceTooSmall) return "workspace too small";
  if (code == stoker::kNoTensorMap) return "the driver makes no map of these tensors";
#if defined(STOKER_SIMT)
  if (code < 0) return "shared-memory races, listed on stderr";
#elif defined(__CUDACC__)
  if (code > 0) return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
  return "";
}
