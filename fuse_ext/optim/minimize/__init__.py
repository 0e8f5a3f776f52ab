"""A function of tensors minimised in one call, as scipy.optimize.minimize does it.

What a user calls and gets (``call``), the tree of tensors as one point within its bounds
(``tree``), and projected L-BFGS, which keeps to them (``bounded``). Without bounds it is LBFGS.
"""
