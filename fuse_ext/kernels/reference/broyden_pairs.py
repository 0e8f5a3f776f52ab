"""The Broyden update on pairs, in plain PyTorch: the twin of csrc/broyden_pairs.h."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.reference.dense import broyden_update


class _Form(NamedTuple):
    """H or B of some members, without what multiplies the identity; views of the arrays."""

    own: Tensor
    other: Tensor
    terms: Tensor
    unit: float

    def times(self, n: int, x_own: Tensor, x_other: Tensor) -> tuple[Tensor, Tensor]:
        """The form of n members times x, by x's products with their rows, as coefficients."""
        own, other = self.own[:n, :n], self.other[:n, :n]
        ss, sw, ww = self.terms[:, :n] * self.unit
        mixed = own @ x_own + other @ x_other
        along = sw * x_own + ww * mixed
        return ss * x_own + sw * mixed + own.T @ along, other.T @ along

    def extend(
        self, n: int, x_own: Tensor, x_other: Tensor, square: float, identity: float
    ) -> float:
        """Writes the row of member n, the form times its x; x'(form)x."""
        row_own, row_other = self.times(n, x_own, x_other)
        self.own[n, :n], self.own[n, n] = row_own, 0.0
        self.other[n, :n], self.other[n, n] = row_other, self.unit * identity
        return float(row_own @ x_own + row_other @ x_other) + self.unit * identity * square


class _Pairs:
    """The scalars of a ring and what lies beside them."""

    def __init__(self, scalars: Tensor, broyden: Tensor, slots: int) -> None:
        self.scalars, self.broyden, self.slots = scalars, broyden, slots

    def get(self, name: str) -> float:
        return float(self.broyden[ring.broyden_index(name, self.slots)])

    def put(self, **values: float) -> None:
        for name, value in values.items():
            self.broyden[ring.broyden_index(name, self.slots)] = value

    def array(self, name: str) -> Tensor:
        return ring.broyden_array(self.broyden, name, self.slots)

    def held(self) -> list[int]:
        """The slots of the members that the arrays are of."""
        return self.array("member")[: int(self.get("held"))].long().tolist()

    def products(self, rows: list[int], columns: list[int]) -> dict[str, Tensor]:
        """s_i . s_j, s_i . y_j, y_i . y_j and y_i . s_j of these slots."""
        sy = ring.array(self.scalars, "gram_sy", self.slots)
        yy = ring.array(self.scalars, "gram_yy", self.slots)
        return {
            "ss": self.array("gram_ss")[rows][:, columns],
            "sy": sy[rows][:, columns],
            "yy": yy[rows][:, columns],
            "ys": sy[columns][:, rows].T,
        }

    def form(self, name: str) -> _Form:
        own, other, terms = (self.array(f"{name}_{part}") for part in ("own", "other", "terms"))
        return _Form(own, other, terms, self.get(f"{name}_unit"))

    def join(self, members: list[int], n: int, s_b_s: float) -> bool:
        """Member n joins those before it; whether H and B are positive along it."""
        i, older = members[n], members[:n]
        itself = {name: float(value) for name, value in self.products([i], [i]).items()}
        ss, sy, yy = itself["ss"], itself["sy"], itself["yy"]
        if n == 0:
            self.put(initial=sy / yy, inverse_unit=1.0, direct_unit=1.0)
        gamma, to = self.get("initial"), self.products(older, [i])
        inverse, direct = self.form("inverse"), self.form("direct")
        h = inverse.extend(n, to["sy"][:, 0], to["yy"][:, 0], yy, gamma) / sy
        own_b = direct.extend(n, to["ys"][:, 0], to["ss"][:, 0], ss, 1 / gamma) / sy
        if n > 0 and not (h > 0 and own_b > 0):
            return False
        b = s_b_s / sy if s_b_s > 0 else own_b
        tau, phi, theta = 1.0, 1.0, 0.0
        if n > 0:
            scaling = bool(self.scalars[ring.index("self_scaling", self.slots)])
            tau, phi = broyden_update(b, h, int(self.get("taking_part")), True, scaling)
            theta = (1 - phi) / (1 + max(b * h - 1, 0.0) * phi)
        up = [(1 + phi * h / tau) / sy, -phi / sy / tau, (phi - 1) / (h * sy) / tau]
        down = [
            (1 + tau * theta * own_b) / sy,
            -tau * theta / sy,
            tau * (theta - 1) / (own_b * sy),
        ]
        units = inverse.unit / tau, direct.unit * tau
        # The first one is taken as it is: a direction that it makes of nonsense is no descent.
        if n > 0 and not all(map(math.isfinite, (*up, *down, 1 / units[0], 1 / units[1]))):
            return False
        inverse.terms[:, n] = torch.tensor(up, dtype=torch.float64) / units[0]
        direct.terms[:, n] = torch.tensor(down, dtype=torch.float64) / units[1]
        self.put(inverse_unit=units[0], direct_unit=units[1], held=n + 1)
        return True

    def direction(self, members: list[int]) -> None:
        """p = -H g as coefficients, and its products with the members' rows."""
        named = {
            name: ring.array(self.scalars, name, self.slots)
            for name in ("row_scale", "grad_s", "grad_y", "coef_s", "coef_y", "coef_g")
        }
        scale = named["row_scale"][members]
        with_s, with_y = scale * named["grad_s"][members], named["grad_y"][members]
        of_s, of_y = self.form("inverse").times(len(members), with_s, with_y)
        initial = -self.get("inverse_unit") * self.get("initial")
        named["coef_s"][members], named["coef_y"][members] = -scale * of_s, -of_y
        named["coef_g"][0] = initial
        of = self.products(members, members)
        self.array("along_s")[members] = initial * with_s - of["ss"] @ of_s - of["sy"] @ of_y
        self.array("along_y")[members] = initial * with_y - of["ys"] @ of_s - of["yy"] @ of_y


def note_pair(scalars: Tensor, broyden: Tensor, slots: int, opened: int, step: float) -> None:
    """What the step of the pair that has come into slot ``opened`` is to the members' rows."""
    pairs = _Pairs(scalars, broyden, slots)
    made_by, gram_ss = pairs.get("made_by"), pairs.array("gram_ss")
    if made_by > 0:
        members = pairs.held()
        gram_ss[members, opened] = gram_ss[opened, members] = step * pairs.array("along_s")[members]
        gram_sy = ring.array(scalars, "gram_sy", slots)
        gram_sy[opened, members] = step * pairs.array("along_y")[members]
    gram_ss[opened, opened] = step * step * scalars[ring.index("direction_sq", slots)]
    if made_by == 0:
        made_by = pairs.get("runs") + 1
        pairs.put(runs=made_by)
    pairs.array("run")[opened] = max(made_by, 0.0)


def newest_run(scalars: Tensor, broyden: Tensor, slots: int, scaled: bool) -> bool:
    """Whether the newest usable pair has a run; else the two-loop recursion makes the direction."""
    pairs, usable = _Pairs(scalars, broyden, slots), ring.usable_slots(scalars, slots)
    if usable and pairs.array("run")[usable[0]] > 0:
        return True
    pairs.put(made_by=-1.0 if scaled else 0.0, held=0.0)
    return False


def recursion(
    scalars: Tensor, broyden: Tensor, slots: int, step: float, fresh: bool, scaled: bool
) -> None:
    """The direction of the newest pairs of one run, as coefficients."""
    pairs, usable = _Pairs(scalars, broyden, slots), ring.usable_slots(scalars, slots)
    runs = pairs.array("run")[usable].tolist()
    run = runs[0]
    count = next((i for i, other in enumerate(runs) if other != run), len(runs))
    members, held = usable[:count][::-1], pairs.held()
    if pairs.get("held_run") != run or members[: len(held)] != held:
        held = []
    known = fresh and held and pairs.get("made_by") == run and len(held) + 1 == len(members)
    slope = float(scalars[ring.index("direction_dot_grad", slots)])
    s_b_s = -step * step * slope if known else 0.0
    n = len(held)
    while True:
        pairs.array("member")[: len(members)] = torch.tensor(members, dtype=torch.float64)
        pairs.put(held_run=run, held=float(n))
        while n < len(members) and pairs.join(members, n, s_b_s if n + 1 == len(members) else 0.0):
            n += 1
        if n == len(members):
            break
        # H begins anew with the pair that does not fit, the first of another run.
        members, n, run = members[n:], 0, pairs.get("runs") + 1
        pairs.put(runs=run)
        pairs.array("run")[members] = run
    for name in ("coef_s", "coef_y"):
        ring.array(scalars, name, slots)[ring.held_slots(scalars, slots)] = 0.0
    pairs.direction(members)
    pairs.put(made_by=-1.0 if scaled else run)
