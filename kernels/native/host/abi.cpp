#include "native/abi_functions.h"
