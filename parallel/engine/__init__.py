"""Megatron-core behind one seam: process groups from a plan, pipeline, gradient reduction, expert dispatch.
Not here: the model, the objective, or a decision that planning could have taken without torch.
Start with ``groups.py``, then ``seam.py`` (what is corrected in Megatron, and why)."""
