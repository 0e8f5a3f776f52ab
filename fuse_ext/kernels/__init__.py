"""The ops in C++ behind one typed protocol (ops.py), and what is close to them.

bound_ops.py binds them to one set of parameters, reference/ has their twins in plain PyTorch,
scalars.py the names of L-BFGS's scalars, fixed_step.py what a step without a line search decides
without the host, capture.py what may not be done while a CUDA graph is captured, hooks.py and
require.py what the package needs of torch. May touch only csrc (``fuse_ext._C``) and
fuse_ext.checks.
"""
