"""The metric of matrices: Adam in the eigenbasis of the covariances of their gradients.

:mod:`kronecker` holds and renews it, :mod:`sides` says which weights have one and in what blocks,
:mod:`bases` turns them, and :mod:`worth` says which are worth having; :mod:`state` is what of all
that a parameter's state keeps.
"""
