"""``python -m parallel.planning.accuracy``: measure how accurate the planner is; ``--fit`` calibrates it again."""

from parallel.planning.accuracy.held_out import main

main()
