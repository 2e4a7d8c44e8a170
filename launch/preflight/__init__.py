"""What must hold on a node before ranks start: every check finds, says what it found, and what to do about it.
Not here: anything that a running job needs; that is ``launch/supervise``.
Start with ``run.py``, then ``shared.py`` (how nodes compare themselves)."""
