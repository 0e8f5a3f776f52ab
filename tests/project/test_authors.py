"""The paper's image data in the settings of its authors' code."""

import itertools
import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from benchmarks.harness import cells
from benchmarks.paper import __main__ as paper
from benchmarks.paper import authors, page
from benchmarks.paper import authors_training as training
from benchmarks.paper.authors_networks import build

PROBLEMS = tuple(training.PROBLEMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command leaves in quick mode: the page in ``out``, the runs in ``cells``."""
    found = tmp_path_factory.mktemp("authors")
    command(found)
    return found


@pytest.fixture(scope="module")
def results(folder):
    """Of all runs of quick mode, by key."""
    return cells.results_of(authors.cells("authors", True, None, {}), folder / "cells")


def command(folder, *options):
    """The command in quick mode; returns the page."""
    places = ["--out", str(folder / "out"), "--cells", str(folder / "cells"), "--workers", "0"]
    paper.main(["--quick", "--only", "authors", *places, *options])
    return (folder / "out" / "README.md").read_text()


# --- networks -------------------------------------------------------------------------------


def test_sizes_of_networks():
    def parameters(name, shape):
        return sum(p.numel() for p in build(name, shape).parameters())

    assert parameters("logistic", (1, 28, 28)) == 7850
    assert parameters("mlp", (1, 28, 28)) == 784 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10
    heads = 120 * 84 + 84 + 84 * 10 + 10
    for shape, left in (((1, 16, 16), 1), ((1, 28, 28), 4), ((3, 32, 32), 5)):
        convolutions = shape[0] * 6 * 25 + 6 + 6 * 16 * 25 + 16
        assert parameters("cnn", shape) == convolutions + 16 * left**2 * 120 + 120 + heads
    norms = 2 * (64 + 32 + 16)
    dense = 3 * 64 * 9 + 64 * 32 + 32 * 16 + norms + 16 * 10 + 10
    assert parameters("densenet", (3, 32, 32)) == dense


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn", "densenet"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_networks_have_a_score_for_each_class(name, shape):
    torch.manual_seed(0)
    scores = build(name, shape)(torch.rand(4, *shape))
    assert scores.shape == (4, 10)
    between = (scores > 0).all() and (scores < 1).all()
    assert between == (name == "logistic")  # the sigmoid


def test_networks_that_do_not_exist():
    with pytest.raises(ValueError, match=r"name must be 'logistic', .* got 'vgg'"):
        build("vgg", (1, 16, 16))
    with pytest.raises(ValueError, match="16 x 16 pixels or more for 'cnn', got 28 x 8"):
        build("cnn", (1, 28, 8))


# --- their FUSE -----------------------------------------------------------------------------


class Square:
    """A loss of one parameter, and how often it was asked for."""

    def __init__(self, value):
        self.x = torch.nn.Parameter(torch.tensor([float(value)]))
        self.calls, self.scale = 0, 1.0

    def __call__(self):
        self.calls += 1
        self.x.grad = None
        loss = self.scale * (self.x**4).sum()
        loss.backward()
        return loss


def test_their_lbfgs_needs_three_epochs_and_a_small_loss():
    loss = Square(1.0)
    fuse = training.AuthorsFuse([loss.x], lr=0.01)
    for _ in range(3):
        assert fuse.phase == "adam"
        fuse.step(loss)
        fuse.next_epoch()
    assert loss.calls == 3 and fuse.loss < 2 and fuse.phase == "lbfgs"
    fuse.step(loss)
    assert loss.calls >= 3 + 5  # one to begin, four or so, and one for the loss that is left
    assert fuse.loss == loss().item()

    # A batch that leaves a large loss is followed by one of Adam's.
    for left in (1e9, math.nan):
        loss.scale = left
        fuse.step(loss)
        before = loss.calls
        assert not fuse.loss < 2 and fuse.phase == "adam"
        fuse.step(loss)
        assert loss.calls == before + 1
        loss.scale = 1.0
        fuse.step(loss)
        loss.x.data.fill_(1.0)
        fuse.loss = 1.0


def test_their_lbfgs_waits_for_the_loss():
    loss = Square(3.0)
    fuse = training.AuthorsFuse([loss.x], lr=1e-3)
    for _ in range(6):
        fuse.step(loss)
        fuse.next_epoch()
    assert loss.calls == 6 and fuse.loss > 2 and fuse.phase == "adam"


# --- training -------------------------------------------------------------------------------


def test_what_is_left_of_an_epoch_is_dropped():
    found = list(itertools.islice(training.batches(10, 4, seed=1), 4))
    assert [len(rows) for rows in found] == [4] * 4
    epochs = [torch.cat(found[:2]).tolist(), torch.cat(found[2:]).tolist()]
    assert all(len({*rows}) == 8 for rows in epochs) and epochs[0] != epochs[1]
    again = next(training.batches(10, 4, seed=1))
    assert torch.equal(again, found[0])


def test_the_settings_are_theirs():
    specs = [training.find_problem(name) for name in PROBLEMS]
    assert {(spec.batch, spec.epochs) for spec in specs} == {(512, 100)}
    assert authors.seeds(False) == (0, 1, 2, 42)
    described = {method: authors.optimizer(method, 100, False) for method in authors.METHODS}
    assert described == {
        "sgd": {"name": "sgd", "lr": 0.01},
        "adam": {"name": "adam", "lr": 0.001},
        "adam_sgd": {"name": "adam_sgd", "lr": 0.001, "sgd_lr": 0.01, "switch": 50},
        "authors_fuse": {"name": "authors_fuse", "lr": 0.001},
        "fuse_pv": {"name": "fuse_pv", "lr": 0.001},
    }
    options = training.AuthorsFuse([torch.zeros(1)]).lbfgs.param_groups[0]
    assert (options["lr"], options["max_iter"], options["max_eval"]) == (1, 20, 4)
    assert (options["history_size"], options["line_search_fn"]) == (10, "strong_wolfe")


def test_a_rivals_runs_do_not_depend_on_ours():
    modules = {method: training.module_of(method) for method in authors.METHODS}
    assert modules["fuse_pv"] == ("benchmarks.harness.ours",)
    assert modules["sgd"] == ("benchmarks.harness.rivals",) and modules["authors_fuse"] == ()


def test_batch_normalisation_learns_in_the_first_epoch_alone(monkeypatch):
    made = []
    monkeypatch.setattr(training, "build", lambda *args: made.append(build(*args)) or made[-1])
    training.train("cifar10", {"name": "adam", "lr": 1e-3}, 0, quick=True)
    spec = training.find_problem("cifar10", quick=True)
    counts = [int(b) for name, b in made[0].named_buffers() if "tracked" in name]
    assert spec.epochs > 1 and counts == [spec.images // spec.batch] * 3


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients_are_counted(results, problem):
    spec = training.find_problem(problem, quick=True)
    per_epoch = spec.images // spec.batch
    runs = {m: results[f"authors/{problem}/{m}/0"] for m in authors.METHODS}
    assert len({run["train_loss"][0] for run in runs.values()}) == 1  # one start for all
    for method in authors.FIRST_ORDER:
        run = runs[method]
        assert run["evaluations"] == run["epoch"] == list(range(spec.epochs + 1))
        assert run["at_equal_evaluations"]["train_loss"] == run["train_loss"][-1]
    assert runs["adam_sgd"]["switch_epoch"] == spec.epochs / 2
    assert runs["adam_sgd"]["train_loss"][3] == runs["adam"]["train_loss"][3]

    theirs, equal = runs["authors_fuse"], runs["authors_fuse"]["at_equal_evaluations"]
    assert theirs["train_loss"][:4] == runs["adam"]["train_loss"][:4]
    assert theirs["switch_epoch"] == 3 and theirs["second_steps"][-1] == 3 * per_epoch
    assert theirs["evaluations"][-1] >= 3 + 5 * 3
    # In the batch in which it had had as many as the others in all.
    assert spec.epochs <= equal["evaluations"] < spec.epochs + 20 / per_epoch
    assert 3 < equal["epoch"] < 4 and equal["train_loss"] != theirs["train_loss"][-1]


def test_problems_say_what_they_are():
    about = training.describe("usps", quick=True)
    assert about["title"] == "digits, CNN" and about["steps_per_epoch"] == 8
    with pytest.raises(ValueError, match=r"problem must be one of .* got 'iris'"):
        training.describe("iris")


# --- the section ----------------------------------------------------------------------------


def test_the_page(folder):
    text = (folder / "out" / "README.md").read_text()
    document = json.loads((folder / "out" / "authors.json").read_text())
    assert text.count(document["sentence"]) == 2 and "Not run yet" not in text
    assert document["verdict"] in page.VERDICTS and document["not_run"] == []
    assert (folder / "out" / "authors.png").stat().st_size > 20_000
    for problem in PROBLEMS:
        methods = document["outcomes"][problem]["methods"]
        for method, found in methods.items():
            mean = 100 * found["tested"]["epochs"]["mean"]
            assert f"{mean:.2f} ± " in text, (problem, method)
    # The paper's FUSE is theirs, not ours.
    assert "| their FUSE | 90.8 ± 0.42 |" in text and "| FusePV | - |" in text


def with_accuracies(results, problem, **of):
    """The results with these accuracies, at equal epochs and at equal gradients."""
    changed = dict(results)
    for method, pair in of.items():
        for i, seed in enumerate(authors.seeds(True)):
            key = f"authors/{problem}/{method}/{seed}"
            run = {**changed[key]}
            run["tested"] = [*run["tested"][:-1], pair[0] + 0.001 * i]
            equal = {**run["at_equal_evaluations"], "tested": pair[1] + 0.001 * i}
            changed[key] = {**run, "at_equal_evaluations": equal}
    return changed


def test_verdicts_follow_the_figures(results):
    low = dict.fromkeys(authors.FIRST_ORDER, (0.5, 0.5))
    changed = results
    for problem in PROBLEMS:
        of = {**low, "authors_fuse": (0.9, 0.4), "fuse_pv": (0.7, 0.7)}
        changed = with_accuracies(changed, problem, **of)
    found = authors.report("authors", changed, True)
    assert found.verdict == page.YES
    assert "on 4 of 4 problems at equal epochs" in found.sentence
    assert (
        "and on 0 at equal gradients. FusePV's, told nothing, is above them on 4 and 4"
        in found.sentence
    )
    assert "win on 0, draw on 0 and loss on 4 at equal epochs" in found.sentence
    assert "win on 4, draw on 0 and loss on 0 at equal gradients" in found.sentence
    untouched = authors.report("authors", results, True)
    (on_all,) = [text for text in untouched.sentence.split(". ") if "On all test images" in text]
    assert on_all in found.sentence

    changed = with_accuracies(changed, "usps", adam=(0.9, 0.9))
    found = authors.report("authors", changed, True)
    assert found.verdict == page.PARTLY and "on 3 of 4 problems" in found.sentence
    for problem in PROBLEMS:
        changed = with_accuracies(changed, problem, sgd=(1.0, 1.0))
    assert authors.report("authors", changed, True).verdict == page.NO


def test_the_papers_figures_are_met_or_not(results):
    changed = results
    for problem in PROBLEMS:
        low = dict.fromkeys(authors.METHODS, (0.5, 0.5))
        changed = with_accuracies(changed, problem, **{**low, "authors_fuse": (0.9, 0.4)})
    assert "of the paper's" not in authors.report("authors", changed, True).sentence
    for problem in ("mnist", "kmnist", "usps"):
        key = f"authors/{problem}/data"
        changed[key] = {**changed[key], "data": "60,000 training and 10,000 test images"}
    # Its FUSE has 90.8, 79.5 and 91.2% there, and nothing in it 50%.
    found = authors.report("authors", changed, True)
    assert "come within 2 points of 2 of the paper's 12 means." in found.sentence
    assert found.data["near_the_papers"]["near"] == ["mnist, their FUSE", "usps, their FUSE"]


def test_a_loss_is_better_where_it_is_lower(results):
    (outcome, *_) = authors.outcomes_of(results, True)
    ours, sgd = (outcome.sample(method, "train_loss") for method in ("fuse_pv", "sgd"))
    assert ours.mean + ours.std < sgd.mean - sgd.std
    assert outcome.verdict("fuse_pv", "sgd", quantity="train_loss") == "win"
    assert outcome.verdict("sgd", "fuse_pv", quantity="train_loss") == "loss"
    run = outcome.runs["sgd"][0]
    run["train_loss"][-1] = None  # of a run that has diverged
    assert outcome.sample("sgd", "train_loss").mean == math.inf


def test_what_is_not_run_yet_is_said(results):
    some = {key: value for key, value in results.items() if "cifar10" not in key}
    assert authors.ready("authors", some, True)
    report = authors.report("authors", some, True)
    assert report.data["not_run"] == ["cifar10"] and set(report.data["outcomes"]) == {
        "mnist",
        "kmnist",
        "usps",
    }
    assert report.sentence.endswith("Not run yet: digits, DenseNet.")
    assert "| digits, DenseNet | not run yet |" in report.text
    assert report.verdict != page.YES and "of 3 problems" in report.sentence
    # A single seed is too few, and is one as soon as a single run is missing.
    del some["authors/mnist/adam/1"]
    assert authors.report("authors", some, True).data["not_run"] == ["mnist", "cifar10"]
    assert not authors.ready("authors", {}, True)


def test_seeds_that_are_not_run_yet_are_said(results, monkeypatch):
    changed = results
    for problem in PROBLEMS:
        low = dict.fromkeys(authors.METHODS, (0.5, 0.5))
        changed = with_accuracies(changed, problem, **{**low, "authors_fuse": (0.9, 0.9)})
    found = authors.report("authors", changed, True)
    assert found.verdict == page.YES and "so far" not in found.text
    monkeypatch.setattr(authors, "QUICK_SEEDS", (0, 1, 2))
    found = authors.report("authors", changed, True)
    assert found.verdict == page.PARTLY
    assert found.text.count("; seeds 0 and 1 alone so far") == len(PROBLEMS)


def test_time_that_is_up(folder, tmp_path, capsys):
    text = command(tmp_path, "--minutes", "0")
    assert "Table II" not in text and not list((tmp_path / "out").glob("*.json"))
    assert "not written, since time was up: authors" in capsys.readouterr().out
    # What is stored is written.
    places = ["--cells", str(folder / "cells")]
    assert "first 500 test images" in command(tmp_path, "--minutes", "0", *places)
    with pytest.raises(SystemExit):
        command(tmp_path, "--minutes", "-1")
    assert "--minutes must be at least 0, got -1.0" in capsys.readouterr().err
