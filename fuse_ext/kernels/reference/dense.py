"""The dense quasi-Newton direction in plain PyTorch: the twin of csrc/broyden.h and its kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuse_ext import _C
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.scalars import MOST_TERMS, TERM_SIZE, TILE, matrix_size
from fuse_ext.kernels.scalars import matrix_place as place

# The ring of which only the header's scalars are used.
_SLOTS = 2


def as_square(matrix: Tensor, numel: int) -> Tensor:
    """M [rows, rows], rows being ``numel`` rounded up to whole tiles, of its lower tiles."""
    rows = -(-numel // TILE)
    i, j = torch.tril_indices(rows, rows, dtype=torch.int64, device=matrix.device)
    tiles = matrix.view(-1, TILE, TILE)
    square = matrix.new_zeros(rows, rows, TILE, TILE)
    square[j, i] = tiles.transpose(1, 2)
    square[i, j] = tiles
    return square.permute(0, 2, 1, 3).reshape(rows * TILE, rows * TILE)


def as_tiles(square: Tensor) -> Tensor:
    """The inverse of :func:`as_square`."""
    rows = square.size(0) // TILE
    i, j = torch.tril_indices(rows, rows, dtype=torch.int64, device=square.device)
    return square.view(rows, TILE, rows, TILE).permute(0, 2, 1, 3)[i, j].reshape(-1)


def broyden_update(
    b: float, h: float, numel: int, broyden: bool, self_scaling: bool
) -> tuple[float, float]:
    """tau and phi of the update (csrc/broyden.h)."""
    if not (b > 0.0 and math.isfinite(b)):
        return 1.0, 1.0
    shrink = 1.0 / b if self_scaling and b > 1.0 else 1.0
    a = b * h - 1.0
    if not broyden or not a > 1e-10 or not math.isfinite(a):
        return shrink, 1.0
    c = math.sqrt(a / (1.0 + a))
    rho = min(1.0, h * (1.0 - c))
    if rho <= 0.0:
        return shrink, 1.0
    theta = max((rho - 1.0) / a, min(1.0 / rho, (1.0 - b) / b))
    sigma = 1.0 + a * theta
    if not sigma > 0.0 or not math.isfinite((1.0 - theta) / sigma):
        return shrink, 1.0
    phi = (1.0 - theta) / sigma
    if not self_scaling:
        return 1.0, phi
    root = sigma ** (-1.0 / max(numel - 1, 1))
    tau = shrink * min(root, 1.0 / theta) if theta > 0.0 else min(shrink * root, sigma)
    return (tau, phi) if tau > 0.0 and math.isfinite(1.0 / tau) else (shrink, 1.0)


def dense_direction(
    grad: Tensor,
    grad_prev: Tensor,
    direction: Tensor,
    matrix: Tensor,
    vectors: Tensor,
    matrix_scalars: Tensor,
    scalars: Tensor,
    lr_scale: Tensor | None,
    pair_step: float | None,
    curvature_tol: float,
    taking_part: int,
    broyden: bool,
    self_scaling: bool,
) -> None:
    """See :class:`fuse_ext.kernels.ops.Ops`."""
    numel = grad.numel()
    most = _check(grad, grad_prev, direction, matrix, vectors, matrix_scalars, scalars, lr_scale)
    header, numbers = ring.read_header(scalars), matrix_scalars.tolist()
    whole = -(-numel // TILE) * TILE
    x = vectors.new_zeros(whole)
    x[:numel] = grad

    def term(t: int) -> slice:
        return slice(place("header") + t * TERM_SIZE, place("header") + (t + 1) * TERM_SIZE)

    def number(name: str) -> float:
        return float(matrix_scalars[place(name)])

    def put(name: str, value: float) -> None:
        matrix_scalars[place(name)] = value

    def a_of(t: int) -> Tensor:
        ss, sw, ww = matrix_scalars[term(t)].tolist()
        return vectors.new_tensor([[ss, sw], [sw, ww]])

    def product(of: Tensor) -> Tensor:
        if number("pairs") == 0.0:
            return of.clone()
        out = as_square(matrix, numel) @ of
        for t in range(int(number("terms"))):
            pair = vectors[2 * t : 2 * t + 2, :whole]
            out += pair.T @ (a_of(t) @ (pair @ of))
        return out * number("scale")

    def tell(name: str, value: float) -> None:
        scalars[ring.index(name, _SLOTS)] = value

    result = None
    if pair_step is not None:
        s, y = torch.zeros_like(x), x.clone()
        s[:numel] = pair_step * direction.double()
        y[:numel] -= grad_prev.double()
        ss, sy, yy = (float(v) for v in (s @ s, s @ y, y @ y))
        norms = math.sqrt(ss) * math.sqrt(yy) if min(ss, yy) >= 0.0 else math.nan
        fits = sy > curvature_tol * norms and yy > 0.0 and math.isfinite(norms + sy)
        tell("pair_cosine", sy / norms if norms else math.nan)
        tell("y_dot_y", yy)
        tell("accepted" if fits else "skipped", (header.accepted if fits else header.skipped) + 1)
        if fits:
            tell("gamma", sy / yy)
            exact = numbers[place("exact")] != 0.0
            s_b_s = -pair_step * pair_step * header.direction_dot_grad if exact else 0.0
            y_h_y = 0.0
            if number("pairs"):
                known = vectors[2 * most, :whole]
                if not number("known"):
                    old = torch.zeros_like(x)
                    old[:numel] = grad_prev
                    known.copy_(product(old))
                result = product(x)
                w = result - known
                y_h_y = float(w @ y)
            if not (y_h_y > 0.0 and math.isfinite(y_h_y)):
                gamma = sy / yy
                matrix.copy_(as_tiles(torch.eye(whole, dtype=x.dtype, device=x.device)))
                put("scale", gamma)
                put("terms", 0.0)
                put("pairs", 0.0)
                w, result, y_h_y, s_b_s = gamma * y, gamma * x, sy, ss / gamma
            assert result is not None
            tau, phi = broyden_update(s_b_s / sy, y_h_y / sy, taking_part, broyden, self_scaling)
            # H+ = H / tau + [s w] A [s w]'
            a = (
                (1.0 + phi * y_h_y / sy / tau) / sy,
                -phi / sy / tau,
                (phi - 1.0) / y_h_y / tau,
            )
            sg, wg = float(s @ x), float(w @ x)
            result = result / tau + (a[0] * sg + a[1] * wg) * s + (a[1] * sg + a[2] * wg) * w
            t, scale = int(number("terms")), number("scale") / tau
            vectors[2 * t, :whole], vectors[2 * t + 1, :whole] = s, w
            matrix_scalars[term(t)] = matrix_scalars.new_tensor(a) / scale
            put("scale", scale)
            put("terms", t + 1.0)
            put("pairs", number("pairs") + 1.0)
            if t + 1 == most:
                square = as_square(matrix, numel)
                for k in range(most):
                    pair = vectors[2 * k : 2 * k + 2, :whole]
                    square = square + pair.T @ a_of(k) @ pair
                # Rounding is not symmetric, and no pair would ever take that away.
                square = square.tril() + square.tril(-1).T
                matrix.copy_(as_tiles(square * scale))
                put("scale", 1.0)
                put("terms", 0.0)
    if result is None:
        result = product(x)
    vectors[2 * most, :whole] = result
    step = -result[:numel] if lr_scale is None else -result[:numel] * lr_scale
    direction.copy_(step)
    grad_prev.copy_(grad)
    p, g = direction.double(), grad.double()
    tell("direction_dot_grad", float(p @ g))
    tell("direction_sq", float(p @ p))
    tell("direction_max", float(p.abs().max()) if numel else 0.0)
    tell("usable", number("pairs"))
    put("known", 1.0)
    put("exact", float(lr_scale is None))


def _check(
    grad: Tensor,
    grad_prev: Tensor,
    direction: Tensor,
    matrix: Tensor,
    vectors: Tensor,
    matrix_scalars: Tensor,
    scalars: Tensor,
    lr_scale: Tensor | None,
) -> int:
    """The checks of csrc/adapters.cpp; the number of terms that there is room for."""
    numel, dtype = grad.numel(), grad.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"grad has dtype {dtype}; expected float32 or float64")

    def check(name: str, tensor: Tensor, length: int, expected: torch.dtype) -> None:
        if tensor.dim() != 1 or tensor.numel() != length or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected a contiguous vector of {length}"
            )
        if tensor.dtype != expected:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}")

    for name, tensor in (("grad", grad), ("grad_prev", grad_prev), ("direction", direction)):
        check(name, tensor, numel, dtype)
    if lr_scale is not None:
        check("lr_scale", lr_scale, numel, dtype)
    check("matrix", matrix, matrix_size(numel), torch.float64)
    whole = -(-numel // TILE) * TILE
    fits = vectors.dim() == 2 and vectors.size(0) >= 3 and vectors.size(0) % 2 == 1
    if not (fits and vectors.size(1) >= whole and vectors.is_contiguous()):
        raise ValueError(
            f"vectors has shape {list(vectors.shape)}; expected a contiguous "
            f"[2 terms + 1, at least {whole}]"
        )
    if vectors.dtype != torch.float64:
        raise TypeError(f"vectors has dtype {vectors.dtype}; expected {torch.float64}")
    most = (vectors.size(0) - 1) // 2
    if most > MOST_TERMS:
        raise ValueError(f"vectors has room for {most} terms; at most {MOST_TERMS} are supported")
    check("matrix_scalars", matrix_scalars, place("header") + TERM_SIZE * most, torch.float64)
    check("scalars", scalars, int(_C.scalar_layout(_SLOTS)["size"]), torch.float64)
    held = float(matrix_scalars[place("terms")])
    if not 0 <= held < most:
        raise ValueError(f"matrix_scalars say that {held} terms are held, with room for {most}")
    return most
