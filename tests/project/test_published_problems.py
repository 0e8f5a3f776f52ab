"""What benchmarks.published minimises: its derivatives, solutions and data are right."""

import math

import pytest
import torch

pytest.importorskip("tqdm")

from benchmarks.published import nist, poisson_heat, resampled, rows, transport
from benchmarks.published.networks import Jet, jet, mlp
from benchmarks.published.pinns import Equation, Pinn, Term

KEPT = 40  # points of a term that a test looks at


def nested(function, points, directions, seconds):
    """A function's jet by nested autograd, as textbooks of PINNs do it."""
    points = points.detach().clone().requires_grad_()
    values = function(points)
    values = values if values.dim() == 2 else values[:, None]
    blocks = []
    for value in values.t():
        gradient = torch.autograd.grad(value.sum(), points, create_graph=True)[0]
        first = [gradient[:, d] for d in directions]
        second = [
            torch.autograd.grad(first[i].sum(), points, create_graph=True)[0][:, d]
            if first[i].requires_grad
            else torch.zeros_like(value)
            for i, d in enumerate(directions[:seconds])
        ]
        blocks.append(torch.stack([value, *first, *second]))
    return Jet(torch.stack(blocks), len(directions))


@pytest.mark.parametrize("seconds", [0, 1, 2])
@pytest.mark.parametrize("features", [Jet.of_inputs, resampled.circles])
def test_carried_derivatives_are_those_of_autograd(features, seconds):
    torch.manual_seed(0)
    points = torch.rand(7, 2, dtype=torch.float64)
    inputs = features(points, (1, 0), seconds)
    width = len(inputs.blocks)
    assert torch.allclose(
        inputs.blocks,
        nested(lambda x: features(x, (), 0).value.t(), points, (1, 0), seconds).blocks,
    )
    model = mlp((width, 6, 5, 2), torch.float64, glorot=False)
    found = jet(model, inputs)
    wanted = nested(lambda x: model(features(x, (), 0).value.t()), points, (1, 0), seconds)
    assert torch.allclose(found.blocks, wanted.blocks, atol=1e-13)
    # And the gradients of something that needs all of them.
    weights = torch.randn_like(found.blocks)
    params = list(model.parameters())
    gradients = [
        torch.autograd.grad((of.blocks.sin() * weights).sum(), params) for of in (found, wanted)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


EQUATIONS = {
    "poisson": poisson_heat.poisson_equation,
    "heat": poisson_heat.heat_equation,
    "convection": lambda: transport.convection(1),
    "reaction": lambda: transport.reaction(1),
    "wave": lambda: transport.wave(1),
    "burgers": lambda: resampled.burgers(1, 500),
    "helmholtz": lambda: resampled.helmholtz(1, 200, 100),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_exact_solution_solves_it(name):
    equation = EQUATIONS[name]()
    for term in equation.terms:
        count = len(term.points)
        # Sides that are compared come as two halves.
        some = torch.arange(count)[:: max(1, count // KEPT)] if count > 300 else torch.arange(count)
        points = term.points[some].double()
        if name == "burgers":  # at t = 0 the formula is a limit
            points = points[points[:, 1] > 1e-3] if term.directions else points
        exact = nested(equation.exact, points, term.directions, term.seconds)
        residual = term.residual(exact, points)
        scale = 1 + exact.blocks.detach().abs().max()
        assert residual.abs().max() < 1e-7 * scale, name
    assert len(equation.test) == len(equation.exact(equation.test))


def test_what_is_not_the_solution_does_not():
    """The test above can fail."""
    for name, make in EQUATIONS.items():
        equation = make()
        term = equation.terms[0]
        points = term.points[:KEPT].double()
        wrong = nested(lambda x: 1 + x[:, 0] ** 2 * x[:, 1], points, term.directions, term.seconds)
        assert term.residual(wrong, points).abs().max() > 0.1, name


def test_burgers_solution_has_enough_nodes():
    points = resampled.burgers(1, 500).test[::97]
    few, many = (resampled.burgers_solution(points, nodes) for nodes in (1001, 5001))
    assert (few - many).abs().max() < 1e-12


def test_somehave_the_sizes_they_say():
    poisson = EQUATIONS["poisson"]()
    assert [len(term.points) for term in poisson.terms] == [900, 120] and len(poisson.test) == 9000
    on_edge = poisson.terms[1].points
    assert (((on_edge == 0) | (on_edge == 1)).any(1)).all()
    wave = EQUATIONS["wave"]()
    assert [len(term.points) for term in wave.terms] == [10_000, 257, 257, 101, 101]
    assert len(wave.test) == 129 * 101 and wave.test.dtype == torch.float32
    burgers = EQUATIONS["burgers"]()
    assert [len(term.points) for term in burgers.terms] == [8000, 500, 500]
    assert [term.weight for term in burgers.terms] == [1, 5, 5]


def test_a_loss_is_a_sum_of_weighted_means_however_it_is_cut(monkeypatch):
    def made():
        return poisson_heat.build(1, "poisson", [5])

    whole = made()
    loss = whole.evaluate()
    monkeypatch.setattr("benchmarks.published.pinns.CHUNK", 77)
    cut = made()
    assert torch.allclose(cut.evaluate(), loss, rtol=1e-13)
    for a, b in zip(whole.params, cut.params, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10)
    # By hand.
    model = whole._model
    equation = poisson_heat.poisson_equation()
    inside, edge = equation.terms
    derivatives = nested(model, inside.points, (0, 1), 2)
    r = derivatives.second[0].sum(0) + 2 * math.pi**2 * equation.exact(inside.points)
    by_hand = r.square().mean() / 2 + model(edge.points).square().mean() / 2
    assert float(by_hand.detach()) == pytest.approx(float(loss), rel=1e-12)
    off = model(equation.test)[:, 0].detach() - equation.exact(equation.test)
    assert whole.error(whole.params) == pytest.approx(float(off.square().mean().sqrt()))


def test_new_points_lie_where_the_residual_is():
    how = resampled.Resampling(10, 4000, (0.0, 0.0), (1.0, 2.0), k=1.0, c=0.0)
    inside = Term(
        torch.rand(200, 2, dtype=torch.float64),
        lambda u, x: torch.where(x[:, 1] > 1, x[:, 1], 0.0) + 0 * u.value[0],
    )
    equation = Equation((inside,), lambda x: x[:, 0], inside.points, True, resampling=how)
    pinn = Pinn(equation, (2, 3, 1), glorot=True, seed=0)
    assert pinn.resample_every == 10
    before = pinn.evaluate()
    pinn.resample()
    points = torch.cat([points for _, points in pinn._pieces[0]])
    assert len(points) == 200 and (points[:, 1] > 1).all() and (points[:, 1] <= 2).all()
    assert pinn.evaluate() > before


def a_file(tmp_path, sign="-"):
    """A file in NIST's format; the numbers are ours: y = b1 (1 - exp(-b2 x)) exactly."""
    b1, b2 = 2.0, 0.5
    data = "".join(f"   {b1 * (1 - math.exp(-b2 * x)):.15f}E0   {x:.1f}E0\n" for x in range(1, 9))
    path = tmp_path / "Misra1a.dat"
    path.write_text(
        "NIST/ITL StRD\nDataset Name:  Misra1a\n\nData:          1 Response Variable  (y)\n\n"
        "Model:  y = b1*(1-exp[-b2*x])  +  e\n\n"
        "        Start 1     Start 2           Parameter     Standard Deviation\n"
        f"  b1 =   {sign}5      0.25           {b1:.10E}  1.0E-01\n"
        f"  b2 =   .1        1.             {b2:.10E}  1.0E-02\n\n"
        "Residual Sum of Squares:                    0.0E+00\n\n"
        "Data:   y               x\n" + data
    )
    return path


def test_nist_files_are_read(tmp_path):
    data = nist.read(a_file(tmp_path))
    assert data.starts.tolist() == [[-5.0, 0.1], [0.25, 1.0]]
    assert data.certified.tolist() == [2.0, 0.5] and data.sum_of_squares == 0
    assert data.x.tolist() == list(range(1, 9)) and data.y[0] == pytest.approx(0.786938680574733)
    assert nist.sum_of_squares("Misra1a", data, data.certified) < 1e-28
    problem = nist.Regression("Misra1a", data, 2)
    assert float(problem.evaluate()) == 1 and problem.params[0].grad is not None
    assert problem.error(problem.params) == pytest.approx(1.0)  # 1 in place of 0.5
    assert problem.error([torch.tensor([8.0, 0.5 * (1 + 1e-5)])]) == pytest.approx(1e-5, rel=1e-2)
    broken = tmp_path / "broken.dat"
    broken.write_text("nothing")
    with pytest.raises(ValueError, match="none of NIST's files"):
        nist.read(broken)


def test_nist_data_may_be_missing(monkeypatch, tmp_path):
    monkeypatch.delenv(nist.FOLDER, raising=False)
    assert nist.folder() is None
    monkeypatch.setenv(nist.FOLDER, str(tmp_path))
    assert nist.folder() is None
    with pytest.raises(FileNotFoundError, match="Misra1a"):
        nist.build(1, "Misra1a")


@pytest.mark.skipif(nist.folder() is None, reason=f"{nist.FOLDER} has no folder nist")
@pytest.mark.parametrize("name", nist.MODELS)
def test_certified_parameters_have_the_certified_sum_of_squares(name):
    folder = nist.folder()
    assert folder is not None
    data = nist.read(folder / f"{name}.dat")
    found = float(nist.sum_of_squares(name, data, data.certified))
    # Lanczos1 was made without noise: its parameters' 11 digits leave more than the residuals.
    assert found == pytest.approx(data.sum_of_squares, rel=1e-9, abs=1e-20)
    for start in (1, 2):
        assert nist.build(start, name).evaluate() == 1


def test_every_row_names_what_it_needs():
    assert len({row.name for row in rows.ALL}) == len(rows.ALL)
    assert sum(len(row.cases) * len(row.seeds) for row in rows.ALL if row.name == "nist") == 54
    for row in rows.ALL:
        assert row.published and row.aims and row.source.startswith("https://")
        assert row.budget[0] > row.budget[1] > 0
