"""How many functions of ours a step calls: on small problems Python is most of what it costs.

Times depend on the machine and on who else is at work on it. Calls do not, and where they creep up
so do microseconds, one feature at a time. Whoever needs more calls raises a bound knowingly, after
a look at benchmarks.per_iteration.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fuse_ext

PACKAGE = str(Path(fuse_ext.__file__).parent)
# Comprehensions are calls in Python 3.10 and 3.11, and none later.
NO_CALLS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>")
WARM_UP, STEPS = 16, 10


def lbfgs(params, **options):
    exact = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "history_size": 10}
    return fuse_ext.LBFGS(params, **exact, **options)


def second_phase(params, **options):
    return fuse_ext.FusePV(params, lr=1e-3, switch=2, lbfgs_lr=1e-3, line_search=None, **options)


# What a step may call: a few more than it does. Searches may take another trial elsewhere.
CASES = {
    "Adam": (fuse_ext.Adam, 12),
    "LBFGS, fixed step": (lambda params: lbfgs(params, lr=1e-3, max_iter=1), 40),
    "LBFGS, five searches": (
        lambda params: lbfgs(params, max_iter=5, line_search_fn="strong_wolfe"),
        340,
    ),
    "FusePV, fixed step": (
        lambda params: second_phase(params, pairs="consecutive", deterministic=False),
        61,
    ),
    "FusePV, fixed step on one function": (
        lambda params: second_phase(params, deterministic=True),
        85,
    ),
    "FusePV, Adam": (lambda params: fuse_ext.FusePV(params, switch=10**6), 50),
}


def closure_of(params):
    """Of a quadratic that is far from its minimum for long, in eight curvatures."""
    curvatures = [10.0**-i for i in range(len(params))]

    def closure():
        with torch.no_grad():
            for param, curvature in zip(params, curvatures, strict=True):
                param.grad = curvature * param
            return 0.5 * sum((param * param.grad).sum() for param in params)

    return closure


def calls(step):
    """Of functions in the package, a step."""
    count = 0

    def profile(frame, event, _):
        nonlocal count
        code = frame.f_code
        ours = event == "call" and code.co_filename.startswith(PACKAGE)
        count += ours and code.co_name not in NO_CALLS

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        for _ in range(STEPS):
            step()
    finally:
        sys.setprofile(before)
    return count / STEPS


@pytest.mark.parametrize("name", CASES)
def test_a_step_calls_no_more_than_it_has_to(name):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(8)]
    make, most = CASES[name]
    optimizer, closure = make(params), closure_of(params)
    step = optimizer.step if name == "Adam" else lambda: optimizer.step(closure)
    closure()
    for _ in range(3 if "searches" in name else WARM_UP):
        step()
    found = calls(step)
    assert 5 < found <= most, f"{found} calls a step"
