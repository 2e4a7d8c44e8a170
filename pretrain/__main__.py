"""``torchrun --nproc-per-node N -m pretrain CONFIG.yaml [section.key=value ...]``"""

from __future__ import annotations

import sys

from pretrain.run import program

sys.exit(program(sys.argv[1:]))
