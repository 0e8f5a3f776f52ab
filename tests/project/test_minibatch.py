"""Minibatch training: the same data for all, and evaluations counted."""

import itertools
import json

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.harness import networks
from benchmarks.harness.minibatch import PROBLEMS, batches, describe, train
from benchmarks.harness.ours import make_switch, make_theta
from fuse_ext import AfterSteps, GradNorm, Never

ADAM = {"name": "adam", "lr": 0.01}
FUSE = {"name": "fuse_pv", "lr": 0.01, "switch": 1}
BATCH = 32 / 320  # of an epoch


def quick(optimizer, seed=0, **options):
    """Two epochs of ten batches."""
    return train("kmnist", optimizer, seed, quick=True, **options)


def test_batches_are_equal_and_their_order_does_not_depend_on_their_size():
    def epochs(size, count):
        rows, sizes = [], []
        for epoch, batch in batches(100, 3, lambda: size):
            rows.append(batch)
            sizes.append(len(batch))
            if epoch == count:
                return torch.cat(rows).tolist(), sizes

    small, sizes = epochs(9, 2)
    assert sizes == [10, *[9] * 10] * 2  # 100 / 9 is nearest to 11
    assert epochs(48, 2)[1] == [50] * 4 and epochs(1000, 2)[1] == [100, 100]
    assert epochs(48, 2)[0] == epochs(1000, 2)[0] == small
    assert sorted(small[:100]) == sorted(small[100:]) == list(range(100))
    assert small[:100] != small[100:]


def test_sizes_may_change_within_an_epoch():
    sizes = iter([10, 10, 40])
    found = list(itertools.islice(batches(100, 0, lambda: next(sizes, 40)), 5))
    assert [len(rows) for _, rows in found] == [10, 10, 40, 40, 50]
    assert [epoch for epoch, _ in found] == [0.1, 0.2, 0.6, 1.0, 1.5]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_first_order_methods_evaluate_once(name):
    run = quick({"name": name, "lr": 0.01})
    assert run["epoch"] == [0, 1, 2] and run["steps"] == [0, 10, 20]
    assert run["evaluations"] == [0, 1, 2]
    assert run["cpu_seconds"][0] == 0 < run["cpu_seconds"][1] < run["cpu_seconds"][2]
    assert run["train_loss"][2] < run["train_loss"][0]
    assert run["switch_step"] is None and run["report"] is None
    json.dumps(run, allow_nan=False)


def test_every_evaluation_of_fuse_pv_counts():
    run = quick({**FUSE, "line_search": "strong_wolfe"})
    assert (run["switch_step"], run["switch_epoch"]) == (10, 1)
    assert run["switch_reason"] == "step 10 >= n=10"
    assert run["evaluations"][1] == 1
    assert run["evaluations"][2] == pytest.approx(run["report"]["evaluations"] * BATCH)
    assert run["evaluations"][2] >= 3  # a line search ends with a gradient on the same batch
    # With a fixed step it is two a step, before it and after it, or one.
    run = quick({**FUSE, "line_search": None, "pairs": "same_batch"})
    assert run["evaluations"] == [0, 1, 3]
    run = quick({**FUSE, "line_search": None, "pairs": "consecutive"})
    assert run["evaluations"] == [0, 1, 2]
    run = quick(FUSE)
    assert run["evaluations"] == [0, 1, 2] and run["report"]["evaluations"] == 20
    json.dumps(run, allow_nan=False)


def test_larger_batches_after_the_switch():
    run = quick({**FUSE, "batch_factor": 5})
    assert run["steps"] == [0, 10, 12] and run["evaluations"] == [0, 1, 2]
    # At once, not from the next epoch on.
    run = quick({**FUSE, "switch": 0.5, "batch_factor": 5})
    assert run["switch_step"] == 5 and run["steps"] == [0, 6, 8]


def test_all_optimizers_begin_alike():
    adam = quick(ADAM, seed=3)
    fuse = quick({**FUSE, "switch": "never"}, seed=3)
    assert fuse["train_loss"] == pytest.approx(adam["train_loss"], rel=1e-4)
    assert fuse["train_loss"][0] == adam["train_loss"][0]
    assert fuse["switch_step"] is None
    # Up to the switch Adam, then another is Adam.
    for second in ({"name": "adam_sgd", "sgd_lr": 0.1}, {"name": "adam_torch_lbfgs"}):
        run = quick({**second, "lr": 0.01, "switch": 1}, seed=3)
        assert run["train_loss"][:2] == adam["train_loss"][:2]
        assert run["train_loss"][2] != adam["train_loss"][2]
        assert run["switch_step"] == 10
    assert quick(ADAM, seed=4)["train_loss"][0] != adam["train_loss"][0]


def test_runs_repeat():
    first, second = quick(FUSE), quick(FUSE)
    assert first.pop("cpu_seconds") and second.pop("cpu_seconds")
    assert first == second


def test_torch_lbfgs_is_counted_too():
    run = quick({"name": "adam_torch_lbfgs", "lr": 0.01, "switch_step": 10})
    assert run["evaluations"][2] == 3  # one for the step's start, one at least for its search
    run = quick({"name": "adam_torch_lbfgs", "lr": 0.01, "switch_step": 10, "max_iter": 20})
    assert run["evaluations"][2] > 10


def test_runs_go_on_until_they_have_had_as_much():
    short = quick(ADAM)
    run = quick(ADAM, until={"evaluations": 3.25, "cpu_seconds": 0.0})
    assert run["epochs"] == 2 and run["epoch"] == [0, 1, 2, 3, 4]
    assert run["test_accuracy"][:3] == short["test_accuracy"]
    assert run["reached"]["evaluations"]["evaluations"] == pytest.approx(3.3)
    assert run["reached"]["cpu_seconds"]["steps"] == 1
    exact = quick(ADAM, until={"evaluations": short["evaluations"][-1]})
    assert exact["reached"]["evaluations"]["test_accuracy"] == short["test_accuracy"][-1]
    assert exact["epoch"] == [0, 1, 2]


def test_a_schedule_ends_with_the_budget():
    run = quick({**ADAM, "schedule": "cosine"}, until={"evaluations": 3})
    assert run["train_loss"][2] < run["train_loss"][1] < run["train_loss"][0]
    assert run["train_loss"][3] == run["train_loss"][2] != quick(ADAM)["train_loss"][2]
    assert quick({**FUSE, "schedule": "cosine"})["switch_step"] == 10


def test_tuning_does_not_see_the_test_images():
    run = quick(ADAM, held_out=True)
    assert run["steps"] == [0, 9, 18] and "32 of the training images held out" in run["data"]


def test_a_loss_that_is_not_finite():
    run = quick({"name": "sgd", "lr": 1e30})
    assert run["train_loss"][-1] is None and run["train_loss"][0] is not None
    assert 0 <= run["test_accuracy"][-1] <= 1
    json.dumps(run, allow_nan=False)


def test_blends():
    run = quick({"name": "fuse", "lr": 0.01, "theta": 1.0, "same_batch_pairs": False})
    assert run["train_loss"] == pytest.approx(quick(ADAM)["train_loss"], rel=1e-4)
    theta = make_theta({"name": "LinearTheta", "epochs": 1.5, "end": 0.5}, 10)
    assert [theta(step) for step in (0, 15, 20)] == [1.0, 0.5, 0.5]
    assert make_theta(0.25, 10) == 0.25
    run = quick({"name": "fuse", "lr": 0.01, "theta": {"name": "CosineTheta", "epochs": 2}})
    assert run["evaluations"] == [0, 2, 4]


def test_switches_by_description():
    assert make_switch("auto", 10) is None
    assert isinstance(make_switch("never", 10), Never)
    assert repr(make_switch(1.5, 10)) == repr(AfterSteps(15))
    found = make_switch({"name": "GradNorm", "zeta": 0.5, "window": 7}, 10)
    assert repr(found) == repr(GradNorm(0.5, window=7))


def test_problems_say_what_they_are():
    about = describe("usps", quick=True)
    assert about["title"] == "digits, CNN" and about["steps_per_epoch"] == 10
    assert about["data"].startswith("digits: 320 of the 1,437")
    with pytest.raises(ValueError, match=r"problem must be one of .* got 'iris'"):
        describe("iris")
    with pytest.raises(ValueError, match="optimizer name 'adagrad'"):
        quick({"name": "adagrad"})


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 16, 16), (3, 32, 32)])
@pytest.mark.parametrize("name", sorted({problem.network for problem in PROBLEMS.values()}))
def test_networks_are_the_same_function_at_every_call(name, shape):
    torch.manual_seed(0)
    model = networks.build(name, shape)
    x = torch.rand(6, *shape)
    first = model(x)
    assert first.shape == (6, 10) and torch.equal(first, model(x))
    assert not list(model.buffers())  # no running statistics
    # Images do not see each other.
    assert torch.allclose(model(x[:2]), first[:2], atol=1e-5)


def test_sizes_of_networks():
    def parameters(name, shape):
        return sum(p.numel() for p in networks.build(name, shape).parameters())

    assert parameters("logistic", (1, 28, 28)) == 7850
    assert parameters("mlp", (1, 28, 28)) == 784 * 128 + 128 + 1280 + 10
    assert parameters("cnn", (1, 16, 16)) == 80 + 8 * 16 * 9 + 16 + 16 * 16 * 10 + 10
    with pytest.raises(ValueError, match=r"name must be .* got 'vgg'"):
        networks.build("vgg", (1, 8, 8))
