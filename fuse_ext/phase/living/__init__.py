"""The second phase on minibatches in a living metric: Adam's averages go on, longer steps first.

:mod:`phase` is the phase, :mod:`lengths` says how long a step is beside Adam's, :mod:`trend` when
to go back to Adam, and :mod:`kronecker` holds the metric of matrices, with :mod:`sides` and
:mod:`bases`.
"""
