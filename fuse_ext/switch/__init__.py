"""When FusePV leaves Adam for L-BFGS: the criteria of FUSE (arXiv 2503.04204), section II.C.

They compose with ``&`` and ``|``: ``AfterSteps(500) & LossPlateau() | AfterEpochs(20)``. They are
Python scalars at work: the squared gradient norm of Eq. 3 comes out of the Adam step, and none but
NearSolution reads the parameters (:class:`When` hands them to the user's function). A loss or
squared norm that is NaN, infinite or larger than 1e290 (sums of such overflow) is passed over as if
its step had not been taken: it enters no mean and no window. A criterion with a window is not true
before the window is full.

May touch nothing but fuse_ext.checks and numbers.
"""
