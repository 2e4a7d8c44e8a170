"""The affine map S_out = M S_in + B of a piece of a sequence, its fold, and the delta rule cut in parallel pieces.
Not here: ranks and collectives; a caller that gathers pairs of several ranks folds them as if they were its own.
Start with ``reference.py``, the definition; then ``op.py`` (pairs, fold) and ``split.py`` (the cut delta rule)."""
