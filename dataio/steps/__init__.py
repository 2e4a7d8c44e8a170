"""The stages of a preparation: what tasks each has, what these read and write.
Not here: the work itself, which the modules do that a step names; it knows nothing of recipes and stages.
Start with ``dataio/prepare.py``, which calls the steps in order."""
