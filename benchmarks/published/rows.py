"""The rows: what was published and where, and what we run beside it.

What stands under ``published`` is taken from the named sources, with the settings that they give;
"second-hand" is what others report of a source. What they do not say is not made up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.published import nist

HERE = "benchmarks.published"
DANGEL = "https://arxiv.org/abs/2405.15603"
RATHORE = "https://arxiv.org/abs/2402.01868"
KIYANI = "https://arxiv.org/abs/2501.16371"
JNINI = "https://arxiv.org/abs/2604.05230"
CERES = "https://github.com/ceres-solver/ceres-solver"

RMS = "root mean square error"
RELATIVE = "relative l2 error"
SOLVED = "runs of 54 without 4 digits"


@dataclass(frozen=True)
class Row:
    """One problem.

    Attributes:
        name: Of its cells and its picture.
        title: On the page.
        problem: See :func:`benchmarks.published.course.run`.
        cases: Options of the problem, by name; a run for each.
        measure: What is compared; less is better.
        published: Values of the measure by method.
        source: Its address.
        their_settings: What the source says of settings, budget and device, and more.
        our_settings: Likewise.
        aims: Values of the measure that we want to reach.
        seeds: The first ones are run first. Those of the source where it names any.
        budget: Evaluations, in full and in quick mode.
        lr: Adam's before L-BFGS, by hand and in FusePV.
        adam_lr: Of Adam alone: of the source, or the best of 1e-3, 3e-3 and 1e-2 on another seed.
        adam_steps: Of the recipe by hand, at most a third of the budget.
        at_once: No Adam steps in FusePV either.
        in_quick: Whether quick mode has it.
        quick: Options of the problem that are others in quick mode.
    """

    name: str
    title: str
    problem: str
    cases: dict[str, dict[str, Any]]
    measure: str
    published: dict[str, float]
    source: str
    their_settings: str
    our_settings: str
    aims: tuple[float, ...]
    seeds: tuple[int, ...]
    budget: tuple[int, int]
    lr: float
    adam_lr: float
    adam_steps: int
    at_once: bool = False
    in_quick: bool = True
    quick: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """Of the problem."""
        return self.problem.partition(":")[0]


def _dangel(
    equation: str,
    title: str,
    hidden: list[int],
    published: dict[str, float],
    note: str = "",
    **more: Any,
) -> Row:
    deep = len(hidden) > 1
    return Row(
        name=f"{equation}-deep" if deep else equation,
        title=title,
        problem=f"{HERE}.poisson_heat:build",
        cases={"": {"equation": equation, "hidden": hidden}},
        measure=RMS,
        published=published,
        source=DANGEL,
        their_settings="float64, 900 points inside and 120 on the boundary, drawn once; least "
        f"error of the best run of a search over settings, 1,000 s on a GPU{note}",
        our_settings="float64, as many points, drawn once",
        seeds=(1, 2, 3),
        budget=(10_000, 40) if deep else (20_000, 300),
        lr=1e-3,
        adam_lr=1e-2,
        adam_steps=1000,
        **more,
    )


def _rathore(equation: str, title: str, width: int, seed: int, lr: float, steps: int) -> Row:
    values = RATHORE_VALUES[equation]
    names = ("Adam", "L-BFGS", "Adam, then L-BFGS", "Adam, L-BFGS, then NysNewton-CG")
    return Row(
        name=f"{equation}-{width}",
        title=f"{title}, width {width}",
        problem=f"{HERE}.transport:build",
        cases={"": {"equation": equation, "hidden": [width] * 3}},
        measure=RELATIVE,
        published=dict(zip(names, values, strict=True)),
        source=RATHORE,
        their_settings="float32, width 200, 10,000 points of a grid, drawn once; 41,000 "
        f"iterations, of which Adam {steps:,} at {lr:g}, L-BFGS with 100 pairs and strong Wolfe; "
        "NysNewton-CG 2,000 iterations more; best seed and learning rate; the device is not noted",
        our_settings=f"float32, width {width}, as many points",
        aims=(values[2] / 2, values[3]),
        seeds=(seed, *[other for other in RATHORE_SEEDS if other != seed][:2]),
        budget=(20_000, 30),
        lr=lr,
        adam_lr=lr,
        adam_steps=steps,
        in_quick=width == 50,
    )


RATHORE_SEEDS = (123, 234, 345, 456, 567)
RATHORE_VALUES = {
    "convection": (6.0e-2, 8.3e-3, 4.19e-3, 1.94e-3),
    "reaction": (2.1e-2, 3.8e-2, 1.92e-2, 9.92e-3),
    "wave": (3.5e-1, 3.4e-1, 5.52e-2, 1.27e-2),
}


def _helmholtz(name: str, points: int, in_quick: bool) -> Row:
    return Row(
        name=name,
        title=f"Helmholtz, {points:,} points, resampled",
        problem=f"{HERE}.resampled:build_helmholtz",
        cases={"": {"hidden": [30] * 4, "every": 200, "points": points}},
        measure=RELATIVE,
        published={
            "dense self-scaled Broyden": 3.6e-9,
            "dense BFGS": 3.7e-7,
            "SOAP": 4.2e-4,
        },
        source=JNINI,
        their_settings="second-hand: float64, 4 layers of 30, 15,000 points resampled every 200 "
        "iterations; Adam 1,000 steps at 5e-3; 319 s for the first and 1,038 s for the last, the "
        "device is not noted",
        our_settings=f"float64, the same network, {points:,} points resampled every 200 "
        "evaluations",
        aims=(1e-6, 1e-8),
        seeds=(4, 5, 6),
        budget=(20_000, 60),
        lr=5e-3,
        adam_lr=5e-3,
        adam_steps=1000,
        in_quick=in_quick,
        quick={"every": 20},
    )


ALL = (
    _dangel(
        "poisson",
        "Poisson 2-D, 2-64-1",
        [64],
        {
            "L-BFGS": 1.56e-4,
            "Adam": 9.4e-5,
            "SGD": 2.7e-5,
            "Hessian-free": 3.2e-7,
            "KFAC": 2.0e-7,
            "ENGD": 6.1e-8,
        },
        note="; of Adam 320,000 iterations, of L-BFGS those with 150 pairs, a step of 0.5 and no "
        "line search",
        aims=(2e-7, 6e-8),
    ),
    _dangel(
        "poisson",
        "Poisson 2-D, 2-64-64-48-48-1",
        [64, 64, 48, 48],
        {"L-BFGS": 3.4e-4, "Adam": 2.1e-4, "Hessian-free": 1.25e-6, "KFAC": 7.9e-7},
        aims=(1e-6,),
    ),
    _dangel(
        "heat",
        "Heat 1-D, 2-64-1",
        [64],
        {
            "L-BFGS": 2.7e-4,
            "Adam": 8.0e-5,
            "KFAC": 8.4e-7,
            "Hessian-free": 6.2e-7,
            "ENGD": 2.8e-8,
        },
        aims=(8e-7,),
    ),
    _dangel(
        "heat",
        "Heat 1-D, 2-64-64-48-48-1",
        [64, 64, 48, 48],
        {"L-BFGS": 2.4e-4, "Adam": 1.5e-4, "KFAC": 4.3e-8},
        aims=(1e-6,),
    ),
    *(
        _rathore(equation, title, width, seed, lr, steps)
        for width in (50, 200)
        for equation, title, seed, lr, steps in (
            ("convection", "Convection, beta = 40", 345, 1e-4, 11_000),
            ("reaction", "Reaction, rho = 5", 456, 1e-3, 1000),
            ("wave", "Wave, beta = 5", 234, 1e-4, 1000),
        )
    ),
    Row(
        name="burgers",
        title="Burgers, resampled",
        problem=f"{HERE}.resampled:build_burgers",
        cases={"": {"hidden": [20] * 4, "every": 500}},
        measure=RELATIVE,
        published={"dense self-scaled Broyden": 1.6e-8},
        source=KIYANI,
        their_settings="second-hand: float64, 4 layers of 20, 8,000 + 500 + 500 points, resampled "
        "every 500 iterations; Adam 1,000 steps at 5e-3, then up to 50,000 iterations in 2,878 s, "
        "the device is not noted",
        our_settings="float64, the same network and numbers of points, resampled every 500 "
        "evaluations",
        aims=(1e-5, 1e-7),
        seeds=(2, 3, 4),
        budget=(10_000, 40),
        lr=5e-3,
        adam_lr=5e-3,
        adam_steps=1000,
        quick={"every": 20},
    ),
    _helmholtz("helmholtz", 2000, in_quick=True),
    _helmholtz("helmholtz-15000", 15_000, in_quick=False),
    Row(
        name="nist",
        title="NIST's nonlinear regressions",
        problem=f"{HERE}.nist:build",
        cases={name: {"name": name} for name in nist.MODELS},
        measure=SOLVED,
        published={"Ceres Solver, BFGS or L-BFGS": 1},
        source=CERES,
        their_settings="27 problems from 2 starts, float64; 53 of 54 to at least 4 digits of every "
        "parameter; budget and device are not noted",
        our_settings="27 problems from 2 starts, float64, parameters in units of their start "
        "values and the sum of squares in units of that at the start; L-BFGS from the start, "
        "since Adam's steps of one size for all have no use here (Adam itself at 1e-2)",
        aims=(4,),
        seeds=(1, 2),
        budget=(5000, 250),
        lr=1e-2,
        adam_lr=1e-2,
        adam_steps=0,
        at_once=True,
    ),
)
