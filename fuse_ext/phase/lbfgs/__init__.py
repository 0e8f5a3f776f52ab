"""Floor 5, within phase/: L-BFGS on one function or one batch (Algorithms 1 and 2).

The phase (``phase``) around the ``iteration`` with a line search or a fixed step, Adam's
``excursion`` for one step where search after search fails, and the fixed step that the ``device``
decides alone, for CUDA graphs.
"""
