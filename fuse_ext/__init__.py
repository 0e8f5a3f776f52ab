"""fuse_ext: Adam first, then L-BFGS, in one optimizer, on fused kernels.

FUSE (arXiv 2503.04204) for PyTorch: :class:`FusePV` (Algorithm 4) and :class:`Fuse`
(Algorithm 3), and its two halves alone, :class:`Adam` and :class:`LBFGS`, as drop-ins for
``torch.optim``'s.
"""

from fuse_ext.kernels.require import require as _require

_require()

from fuse_ext import _C  # noqa: E402
from fuse_ext._version import __version__  # noqa: E402
from fuse_ext.optim.adam import Adam  # noqa: E402
from fuse_ext.optim.checkpoint.file import save  # noqa: E402
from fuse_ext.optim.checkpoint.prepare import prepare_to_load  # noqa: E402
from fuse_ext.optim.estimate_memory import estimate_memory  # noqa: E402
from fuse_ext.optim.fuse import CosineTheta, Fuse, LinearTheta  # noqa: E402
from fuse_ext.optim.fuse_pv import FusePV  # noqa: E402
from fuse_ext.optim.lbfgs import LBFGS  # noqa: E402
from fuse_ext.optim.minimize.call import Minimum, minimize  # noqa: E402
from fuse_ext.switch.criterion import Observation, Switchover  # noqa: E402
from fuse_ext.switch.eq3_eq4 import GradNorm, LossChange  # noqa: E402
from fuse_ext.switch.known_optimum import LossGap, NearSolution  # noqa: E402
from fuse_ext.switch.plateau import LossPlateau  # noqa: E402
from fuse_ext.switch.steps import AfterEpochs, AfterSteps, AtOnce, Never, WarmUp  # noqa: E402
from fuse_ext.switch.when import When  # noqa: E402
from fuse_ext.tell.record import Log  # noqa: E402
from fuse_ext.tell.report import Report  # noqa: E402
from fuse_ext.tell.unwrap import unwrap  # noqa: E402

__all__ = [
    "LBFGS",
    "Adam",
    "AfterEpochs",
    "AfterSteps",
    "AtOnce",
    "CosineTheta",
    "Fuse",
    "FusePV",
    "GradNorm",
    "LinearTheta",
    "Log",
    "LossChange",
    "LossGap",
    "LossPlateau",
    "Minimum",
    "NearSolution",
    "Never",
    "Observation",
    "Report",
    "Switchover",
    "WarmUp",
    "When",
    "__version__",
    "build_info",
    "estimate_memory",
    "minimize",
    "prepare_to_load",
    "save",
    "unwrap",
]


def build_info() -> dict[str, str | None]:
    """What this build was made for.

    Returns:
        version: of fuse_ext. torch: the version it was compiled against. cuda: toolkit version,
        or None for a CPU build. cuda_archs: GPU architectures compiled for. cpu_level: the
        instruction set of the CPU kernels in use ("default", "avx2", "avx512"; force one with
        the environment variable FUSE_EXT_CPU_LEVEL).
    """
    return _C.build_info()
