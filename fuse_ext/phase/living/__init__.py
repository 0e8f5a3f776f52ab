"""The second phase on minibatches in a living metric: Adam's averages go on, longer steps first.

:mod:`phase` is the phase, :mod:`lengths` says how long a step is beside Adam's, :mod:`descent` and
:mod:`trend` look at losses, :mod:`average` keeps the mean of the weights, and :mod:`metric` is that
of matrices.
"""
