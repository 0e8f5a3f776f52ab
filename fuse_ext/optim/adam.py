"""Adam (Eq. 2), drop-in for ``torch.optim.Adam`` and ``AdamW``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.moments import Moments, check_adam_state
from fuse_ext.kernels.hooks import with_grad, without_grad
from fuse_ext.optim.flat_optimizer import FlatOptimizer
from fuse_ext.optim.options import ADAM_TABLE
from fuse_ext.phase.adam import make_moments
from fuse_ext.vector.flat import Closure


class Adam(FlatOptimizer):
    r"""Adam and AdamW as one fused kernel over all parameters; drop-in for ``torch.optim``'s.

    For step k = 1, 2, ... and gradient g (Eq. 2, with the step count of Kingma and Ba):

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \\
        x &\leftarrow x - \frac{\mathrm{lr}}{1 - \beta_1^k}
            \frac{m}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}

    A step reads and writes 28 bytes a parameter in float32, whatever the number of tensors.
    bfloat16 and float16 parameters keep float32 moments (torch keeps them in the parameter's
    dtype). ``state_dict`` has torch's own form: checkpoints go both ways. The entries of ``state``
    are views of flat buffers: write into them, or replace a parameter's whole entry; a tensor put
    into an entry in place of its view is not seen.

    Args:
        params: Tensors or parameter groups, all on one device; float32, float64, bfloat16,
            float16 or complex. A tensor without a gradient is skipped, as in torch.
        lr: Step size, a float or one-element tensor.
        betas: Decay rates of the moments, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: L2 penalty added to the gradient, or decoupled (AdamW).
        amsgrad: Divide by the largest v so far (Reddi et al. 2018).
        maximize: Ascend.
        decoupled_weight_decay: AdamW (Loshchilov and Hutter 2019).
        eps_inside_root: Eq. 2c as the paper prints it: the constant stands inside the root,
            :math:`x \leftarrow x - \mathrm{lr} \sqrt{1 - \beta_2^k} / (1 - \beta_1^k)\; m /
            \sqrt{v + \epsilon}`.
        moment_dtype: How the moments are stored: None for float32 (float64 where a parameter has
            it), or torch.bfloat16 for real parameters of at most float32: half the memory, and 20
            instead of 28 bytes a parameter and step. The step itself is float32, with this step's
            moments as they are before they are stored. m and v are rounded stochastically, so that
            no update is lost, however small: each rounding has mean 0 and is off by less than
            2^-7 of the value. Over the steps that an average remembers the errors add up: where
            gradients are noise, to 0.5% of m at beta1 = 0.9 and 4% of v at beta2 = 0.999 (2% of
            the step's length; standard deviations). amsgrad's largest v is rounded to nearest;
            as the largest of noisy ones it is some 5% too large. The random bits depend on the
            step count and the element's place alone: runs repeat bit for bit. Checkpoints of any
            dtype are taken and given.
        master_weights: Step weights in float32 that are kept in the state (``master_weight``), of
            which bfloat16 and float16 parameters are the rounding: in them alone a step of less
            than a 512th of a weight (a 4096th in float16) is lost. A parameter that is written to
            in between is taken over, unless through ``p.data``. Wider parameters have none. A
            checkpoint without them can be loaded, and theirs by who does without.
        capturable: The step reads nothing from the device: step counts lie there, and ``lr`` may
            (a tensor on the parameters' device), so that a CUDA graph can repeat it. Take a step
            before the capture.
        foreach, fused: Accepted for torch's sake, one of them at a time; there is one, fused, way
            here.
        differentiable: Not supported.
        backend: "auto" (C++ kernels where there are some), "native" or "reference" (plain
            PyTorch).
        process_group: Over whom :attr:`grad_norm_sq` is summed; as in :class:`~fuse_ext.FusePV`.
        shard_state: As in :class:`~fuse_ext.FusePV`.

    Memory: 8 bytes a parameter, 12 with amsgrad; double for float64, half with bfloat16 moments;
    4 more with master weights. With ``shard_state`` a rank's share of that.

    Raises:
        ValueError, TypeError: An option out of range; parameters that are empty, repeated, on
            several devices, sparse or not floating point.

    References:
        Kingma and Ba, Adam: A method for stochastic optimization, ICLR 2015. FUSE, Eq. 2.
    """

    _table = ADAM_TABLE
    # GradScaler then leaves unscaling to the kernel.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        eps_inside_root: bool = False,
        moment_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        backend: str = "auto",
        process_group: Any = None,
        shard_state: bool = False,
    ) -> None:
        defaults = self._table.defaults(locals())
        self._table.check(defaults)
        if fused and foreach:
            raise RuntimeError("fused=True and foreach=True exclude each other")
        self._moments: Moments | None = None
        super().__init__(params, defaults, backend, process_group)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        keys = [i for group in state_dict["param_groups"] for i in group["params"]]
        check_adam_state(state_dict["state"], self.flat.params, keys)

    def _check_fused(self) -> None:
        """Raises RuntimeError, as torch does at the first step, where there is nothing to fuse."""
        if self.flat.device.type != "meta":
            return
        for group in self.param_groups:
            if group["fused"] and any(p.grad is not None for p in group["params"]):
                raise RuntimeError(
                    "`fused=True` requires all the params to be floating point Tensors with "
                    f"memory of their own, got device {self.flat.device}"
                )

    def _adopt_state(self) -> None:
        self._moments = self._make_moments() if self.state else None

    def _make_moments(self) -> Moments:
        return make_moments(self.flat, self._ops, self.state, self.param_groups)

    @without_grad
    def step(self, closure: Closure | None = None) -> Any:
        """One step.

        Args:
            closure: Reevaluates the model and returns the loss; optional.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            loss = with_grad(closure)
        moments = self._moments
        if moments is None or moments.outdated(self.state):
            self._renew_layout()
            self._check_fused()
            check_adam_state(self.state, self.flat.params, self.flat.params, "state")
            moments = self._moments = self._make_moments()
        # GradScaler sets these two around the call.
        moments.step(
            self.param_groups,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        return loss

    @property
    def grad_norm_sq(self) -> float:
        """Sum of the squared gradients of the last step, free of charge (Eq. 3's summand).

        It is read from the device.
        """
        return self._moments.grad_norm_sq if self._moments else 0.0
