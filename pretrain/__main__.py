"""``torchrun --nproc-per-node N -m pretrain CONFIG.yaml [section.key=value ...]``"""

from __future__ import annotations

import sys

from pretrain.run import main

sys.exit(main(sys.argv[1:]))
