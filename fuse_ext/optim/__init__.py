"""Floor 6: what a user constructs.

FusePV (``fuse_pv``, Algorithm 4), Fuse (``fuse``, Algorithm 3), LBFGS and Adam (``lbfgs``,
``adam``) on one base (``flat_optimizer``, torch.optim's contract over a flat state); the table of
their options (``options``), what they will hold (``estimate_memory``), and a function minimised
in one call (``minimize/``). May touch every room.
"""
