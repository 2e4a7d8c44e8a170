"""Which layout to run: ranks, shards, capabilities, hardware and costs, as plain data that refuses to be built wrong.
Not here: torch or Megatron; everything answers on a laptop.
Start with ``plan.py`` (the ranks), then ``layout.py`` (the shards of one tensor) and ``search/planner.py``."""
