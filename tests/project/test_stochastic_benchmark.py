"""The tournament on minibatches: its tasks, its terms, and that FusePV can lose."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from benchmarks.harness import averages, cells, networks, rivals
from benchmarks.harness.comparison import Sample, staged
from benchmarks.harness.schedules import SCHEDULES, Schedule, factor
from benchmarks.stochastic import __main__ as stochastic
from benchmarks.stochastic import (
    change,
    duels,
    image_task,
    methods,
    page,
    sections,
    tasks,
    text_task,
)
from benchmarks.stochastic.methods import METHODS, Entry
from benchmarks.stochastic.tournament import Tournament
from benchmarks.stochastic.training import describe, train
from benchmarks.stochastic.transformer import Transformer

DIGITS = {"dataset": "digits", "network": "mlp", "batch": 32, "images": 320}
ADAMW = {"name": "adamw", "lr": 0.01, "weight_decay": 0.01}
FUSE = {"name": "fuse_pv", "lr": 0.01, "switch": 0.5}


def run(optimizer, seed=0, options=DIGITS, steps=20, **more):
    return train("benchmarks.stochastic.image_task", options, optimizer, steps, seed, **more)


# --- schedules --------------------------------------------------------------------------------


def test_schedules():
    course = {name: [factor(name, k, 100) for k in range(101)] for name in SCHEDULES}
    assert set(course["constant"]) == {1.0}
    assert course["cosine"][0] == 1 and course["cosine"][50] == pytest.approx(0.5)
    assert course["cosine"][100] == pytest.approx(0) and factor("cosine", 200, 100) == 0
    assert course["cosine_10"][100] == pytest.approx(0.1)
    assert course["warmup_cosine"][:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(course["warmup_cosine"]) == 1 and course["warmup_cosine"][100] == pytest.approx(0)
    with pytest.raises(ValueError, match="got 'linear'"):
        factor("linear", 0, 1)
    groups = [{"lr": 0.1}, {"lr": 0.3}]
    Schedule(SimpleNamespace(param_groups=groups), "cosine", 10).set(5)
    assert [group["lr"] for group in groups] == pytest.approx([0.05, 0.15])


# --- tasks ------------------------------------------------------------------------------------


def built(steps=20, held_out=False, **options):
    return image_task.build({**DIGITS, **options}, steps, 0, held_out)


def drawn(task, steps):
    """The losses of the model as it is, on the batches of so many steps."""
    return [task.batch()(task.model).item() for _ in range(steps)]


def test_labels_are_wrong_in_training_alone():
    data = image_task._load(DIGITS)
    noisy = image_task.noisy(data, 0.4, 3)
    share = (noisy.y != data.y).float().mean().item()
    assert share == pytest.approx(0.36, abs=0.08)  # a tenth of those drawn are right
    assert torch.equal(noisy.y_test, data.y_test) and "40% of the training labels" in noisy.note
    assert torch.equal(noisy.y, image_task.noisy(data, 0.4, 3).y)


def test_the_data_change_at_half():
    torch.manual_seed(0)
    before, after = built(), built(change="labels")
    after.model.load_state_dict(before.model.state_dict())
    same, other = drawn(before, 20), drawn(after, 20)
    assert same[:10] == other[:10] and all(
        a != b for a, b in zip(same[10:], other[10:], strict=True)
    )
    assert after.judge(9) == before.judge(9) and after.judge(10) != before.judge(10)
    assert after.marks == (0, 5, 10, 20)
    assert built(2000, change="labels").marks == (0, 500, 1000, 1010, 1030, 1100, 1300, 2000)
    data = image_task._load(DIGITS)
    moved = image_task.changed(data, {"change": "inputs"})
    assert torch.equal(moved.x.flatten(1).sort(1)[0], data.x.flatten(1).sort(1)[0])
    assert not torch.equal(moved.x, data.x) and torch.equal(moved.y, data.y)


def test_tuning_sees_no_test_image():
    assert "32 of the training images held out" in built(held_out=True).note
    assert built(held_out=True).judge(0) != built().judge(0)


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    model, x = networks.build("mlp_dropout", (1, 8, 8)), torch.rand(4, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    first, again = (run(ADAMW, options={**DIGITS, "network": "mlp_dropout"}) for _ in range(2))
    assert first["loss"] == again["loss"]


def test_the_transformer_is_causal_and_knows_positions():
    torch.manual_seed(0)
    whole = Transformer(128, 64)
    assert sum(p.numel() for p in whole.parameters()) == 608_000
    hidden = networks.hidden_matrices(whole)
    assert len(hidden) == 12 and all(matrix is not whole.embedding.weight for matrix in hidden)
    model = Transformer(128, 12, width=16, layers=2, heads=2)
    for p in model.parameters():  # enough for attention to matter
        p.data.mul_(8)
    x = torch.randint(128, (2, 12))
    later = x.clone()
    later[:, 8:] = 0
    assert torch.allclose(model(x)[:, :8], model(later)[:, :8], atol=1e-4)
    assert not torch.allclose(model(x)[:, 8:], model(later)[:, 8:], atol=1e-2)
    # The last score depends on the order of what came before.
    swapped = x[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(model(x)[:, -1], model(swapped)[:, -1], atol=1e-3)


def test_text_is_split_and_a_file_will_do(tmp_path):
    (spec,) = tasks.text(("constant",), True, None)
    about = describe(spec.module, spec.options, spec.steps)
    assert about["data"].startswith("Python's help topics, ") and about["hidden_matrices"] == 4
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(32, 127)) * 20)
    (of_file,) = tasks.text(("constant",), True, str(file))
    assert of_file.options["digest"] != spec.options["digest"]
    whole, tuning = (
        text_task.build(of_file.options, 60, 0, held_out) for held_out in (False, True)
    )
    assert whole.note.startswith("book.txt, 1,710 bytes") and "of the 190 after" in whole.note
    assert "1,539 bytes" in tuning.note and "of the 171 after" in tuning.note
    # Of an untrained model about the logarithm of the vocabulary.
    assert whole.judge(0)["loss"] == pytest.approx(math.log(128), abs=0.1)
    file.write_bytes(b"short")
    text_task.text.cache_clear()
    with pytest.raises(ValueError, match="text of 5 bytes is too short for a context of 16"):
        text_task.build(of_file.options, 60, 0, False)


# --- runs -------------------------------------------------------------------------------------


def test_all_begin_alike_and_every_gradient_counts():
    adam, fuse = run(ADAMW), run({**FUSE, "weight_decay": 0.01, "decoupled_weight_decay": True})
    assert adam["step"] == fuse["step"] == [0, 4, 8, 12, 16, 20]
    assert fuse["loss"][:3] == pytest.approx(adam["loss"][:3], rel=1e-3)
    assert fuse["switch_step"] == 10 and adam["switch_step"] is None
    assert adam["gradients"] == adam["step"] and fuse["gradients"][-1] >= 20
    twice = run({**FUSE, "line_search": None, "pairs": "same_batch"})
    assert twice["gradients"][-1] == 30
    json.dumps(fuse, allow_nan=False)


def test_a_run_that_diverges_ends():
    found = run({**ADAMW, "lr": 1e30})
    assert found["loss"][0] is not None and found["loss"][1:] == [None] * 5
    assert len(found["accuracy"]) == 6


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].ours])
def test_rivals_learn(name):
    if reason := methods.left_out(name, 1):
        pytest.skip(reason)
    entry = Entry(name, METHODS[name].own_schedule or "cosine")
    found = run(methods.describe(entry, 0.01, tasks.USUAL, 60), steps=60)
    assert found["gradients"][-1] == 60 and found["accuracy"][-1] > 0.6
    assert found["loss"][-1] < found["loss"][0]


def test_a_missing_package_is_a_row_left_out_in_words(monkeypatch):
    monkeypatch.setitem(rivals.PACKAGES, "soap", "no-such-package")
    assert methods.left_out("soap", 1) == "no-such-package is not installed"
    assert methods.left_out("muon", 0) == "no hidden matrix: it would be AdamW"
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    assert "has no Muon" in methods.left_out("muon", 1)
    assert methods.left_out("adamw", 0) is None and methods.left_out("fuse_pv", 0) is None
    spec = replace(tasks.images(("kmnist",), ("cosine",), True, None)[0], methods=("adamw", "soap"))
    of = Tournament(spec, {}, True)
    of.done[of.describe.key] = {"hidden_matrices": 1, "steps": 60}
    assert [*of.entries()] == [Entry("adamw", "cosine")]
    assert "SOAP on digits, MLP (no-such-package is not installed)" in of.missing()


def test_the_control_is_made_in_one_place():
    usual = methods.describe(Entry("fuse_pv", "cosine"), 0.01, tasks.USUAL, 60)
    control = methods.describe(Entry("control", "cosine"), 0.01, tasks.USUAL, 60)
    assert control == {**usual, **methods.CONTROL} and methods.CONTROL
    half = methods.describe(Entry("control_half", "cosine"), 0.01, tasks.USUAL, 60)
    assert half == {**control, "switch": 0.5}


# --- the tournament ---------------------------------------------------------------------------


def made_up(cell, ours=0.0):
    """A run's result: best at a rate of 0.03, which is outside the first grid."""
    if cell.function.endswith(":describe"):
        return {"data": "all", "parameters": 10, "hidden_matrices": 0, "steps": 100}
    optimizer, steps, seed = (cell.options[name] for name in ("optimizer", "steps", "seed"))
    is_ours = optimizer["name"] == "fuse_pv"
    found = 0.5 - 0.1 * abs(math.log10(optimizer["lr"] / 0.03)) + 0.001 * (seed % 5) + steps / 1e4
    found += ours if is_ours else 0.0
    seconds = steps * (2.0 if is_ours else 1.0)
    return {
        "steps": steps,
        "optimizer": optimizer,
        "step": [0, steps],
        "loss": [2.0, 1.0],
        "accuracy": [0.1, found],
        "gradients": [0, steps],
        "cpu_seconds": [0.0, seconds],
        "switch_step": None,
    }


def played(ours):
    """A tournament of made-up runs, and its cells."""
    spec = tasks.images(("kmnist",), ("constant", "cosine"), False, None)[0]
    of, every = Tournament(spec, {}, False), {}

    def known(done):
        of.done = done
        return of.cells()

    def get(todo):
        every.update({cell.key: cell for cell in todo})
        return {cell.key: made_up(cell, ours) for cell in todo}

    of.done = staged(known, get)
    return of, every


def test_all_are_tuned_alike_and_no_best_rate_is_at_an_edge():
    of, every = played(0.1)
    standings = of.standings()
    # Without Muon, for which the network has nothing.
    assert {entry.method for entry in standings} == {*METHODS} - {"muon"} - {
        name for name in METHODS if methods.left_out(name, 1)
    }
    for standing in standings.values():
        assert standing.search.tried == (0.001, 0.003, 0.01, 0.03, 0.1)
        assert standing.search.best == 0.03 and len(standing.runs) == 5
    assert page.edges([(of.spec, standings)]).startswith("No best learning rate")
    for key, cell in every.items():
        if cell.function.endswith(":train"):
            tuning = "/tuning-" in key
            assert cell.options["held_out"] == tuning
            assert (cell.options["seed"] >= 1000) == tuning


def test_at_equal_time_a_rival_takes_more_steps():
    of, every = played(0.1)
    prefix = "stochastic/schedules/kmnist/adamw-cosine"
    longer = every[f"{prefix}/cpu-seconds/0"].options
    assert longer["steps"] == 200 and longer["optimizer"]["schedule"] == "cosine"
    assert f"{prefix}/gradients/0" not in every  # of which both had as many
    assert not any("/control-" in key and "/cpu-seconds/" in key for key in every)
    adamw = of.standings()[Entry("adamw", "cosine")]
    assert adamw.sample("gradients") == adamw.sample()
    assert adamw.sample("cpu_seconds").mean == pytest.approx(adamw.sample().mean + 0.01)


@pytest.mark.parametrize(("ours", "words"), [(0.1, "wins"), (0.0, "is level"), (-0.1, "loses")])
def test_fuse_pv_can_win_and_lose(ours, words):
    of, _ = played(ours)
    found = duels.duels(of.spec, of.standings())
    beside = {duel.question: duel for duel in found}
    first = "FusePV beside AdamW, each with its best schedule"
    assert f"- {first}, at equal steps: " in duels.sentences(found)
    told = {"wins": "win", "is level": "draw", "loses": "loss"}[words]
    assert beside[first].verdict("steps") == told
    assert beside[first].difference("steps") == pytest.approx(100 * ours, abs=1e-6)
    assert f"**{words}** on KMNIST, MLP (" in duels.sentences(found)
    control = beside["FusePV beside itself in Adam's metric, without a schedule"]
    assert control.verdict("steps") == "draw" and [*control.samples] == ["steps"]
    # A lead that longer runs undo has a line of its own.
    if ours == 0.0:
        assert beside[first].verdict("cpu_seconds") == "loss"
        assert f"{first}, at equal CPU time: wins nowhere" in duels.sentences(found)
    counted = {"win": "1 / 0 / 0", "draw": "0 / 1 / 0", "loss": "0 / 0 / 1"}[told]
    assert f"| {first} | {counted} |" in duels.counts(found)


def test_the_best_schedule_is_chosen_in_tuning():
    standings = {
        Entry("adamw", "constant"): SimpleNamespace(tuned=0.8, sample=lambda: Sample((0.5,))),
        Entry("adamw", "cosine"): SimpleNamespace(tuned=0.7, sample=lambda: Sample((0.9,))),
    }
    assert duels.best_of("adamw", standings) == Entry("adamw", "constant")
    assert duels.best_of("soap", standings) is None


def test_stored_runs_of_rivals_do_not_depend_on_our_sources():
    spec = tasks.images(("kmnist",), ("cosine",), True, None)[0]
    of = Tournament(spec, {}, True)
    theirs, ours = (
        of.cell(Entry(name, "cosine"), "x", 0.1, 0, 60) for name in ("adamw", "fuse_pv")
    )
    package = cells.ROOT / "fuse_ext"

    def sources(cell):
        modules = (cell.function.partition(":")[0], *cell.also)
        return {path for module in modules for path in cells._sources_of(module)}

    assert not [path for path in sources(theirs) if package in path.parents]
    assert package / "optim" / "fuse_pv.py" in sources(ours)
    for cell in (theirs, ours):
        assert {"image_task.py", "training.py", "schedules.py", "networks.py"} <= {
            path.name for path in sources(cell)
        }


# --- the change of task -----------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "told"), [(0.1, "below"), (0.5, "level with"), (0.9, "above")])
def test_a_change_of_task_is_judged_after_a_thousand_steps(ours, told):
    known = change.cells(False, None, {})
    assert len(known) == 3  # what the data are, before all else
    results = {cell.key: {} for cell in known}
    for cell in change.cells(False, None, results)[3:]:
        assert cell.options["steps"] == 2000 and cell.options["optimizer"]["lr"] in change.RATES
        loss = ours if cell.options["optimizer"]["name"] == "fuse_pv" else 0.5
        results[cell.key] = {
            "step": [0, 500, 1000, 1010, 1030, 1100, 1300, 2000],
            "train_loss": [2.0, 1.0, 9.0, 8.0, 7.0, 6.0, 5.0, loss + 0.01 * cell.options["seed"]],
        }
    rows = change.rows(results, False)
    assert len(rows) == 6
    after = rows[0]["losses"]["fuse_pv"]
    assert [*after] == [10, 100, 1000] and after[10].mean == 8 and after[100].mean == 6
    assert f" is {told} AdamW's: MNIST, then its labels permuted at 0.01" in change.sentence(rows)
    json.dumps(change.json(rows))
    results.popitem()
    assert len(change.rows(results, False)) == 5


# --- the module -------------------------------------------------------------------------------


def test_pieces_add_up(tmp_path, monkeypatch, capsys):
    def call(*options):
        line = ["stochastic", "--quick", "--workers", "0", "--out", str(tmp_path), *options]
        monkeypatch.setattr("sys.argv", line)
        stochastic.main()
        return json.loads((tmp_path / "stochastic.json").read_text())

    first = call("--sections", "text", "--methods", "fuse_pv", "--schedules", "constant")
    assert [*first["text"]["text"]] == ["FusePV, constant"] and first["duels"] == []
    assert "AdamW, constant on Text, transformer (not run yet)" in capsys.readouterr().out
    second = call("--sections", "text", "--methods", "adamw", "--schedules", "constant")
    assert second["text"]["text"]["FusePV, constant"] == first["text"]["text"]["FusePV, constant"]
    assert second["duels"][0]["question"].startswith("FusePV beside AdamW")
    # Stored, but nothing more is run when time is up.
    third = call("--sections", "text", "--minutes", "0", "--schedules", "constant")
    assert third["text"] == second["text"]
    # Where no run is stored, the page keeps what it showed, and says so.
    fourth = call("--sections", "text", "--minutes", "0", "--cells", str(tmp_path / "none"))
    assert fourth["text"] == second["text"] and fourth["duels"] == second["duels"]
    page, before = (tmp_path / "stochastic.md").read_text(), second["sections"]["text"]["texts"]
    assert sections.EARLIER in page and all(text in page for text in before)
    with pytest.raises(SystemExit, match="--methods has 'lion'"):
        call("--methods", "lion")


def test_without_data_the_text_remains_and_the_page_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FUSE_EXT_DATA", raising=False)
    small = replace(tasks.text(("constant",), True, None)[0], methods=("adamw",))
    monkeypatch.setattr(tasks, "text", lambda *_: [small])
    line = ["stochastic", "--workers", "0", "--out", str(tmp_path), "--schedules", "constant"]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit, match="failed: minibatch/mnist/data, "):
        stochastic.main()
    text = (tmp_path / "stochastic.md").read_text()
    assert "| AdamW | constant |" in text and "What failed: no data set 'mnist': set FUSE" in text
    assert "Not here: Images at the paper's learning rates" in text


def test_the_control_is_averaged_as_fuse_pv_is() -> None:
    """By constants of its own, since a rival's stored runs must not depend on our sources."""
    from fuse_ext.phase.living import average
    from fuse_ext.phase.modes import FIRST_STEPS

    ours = FIRST_STEPS, average.EVERY, average.SHARE
    assert ours == (averages.FIRST_STEP, averages.EVERY, averages.SHARE)
    model = torch.nn.Linear(1, 1, bias=False)
    mean = averages.Averaged(model, torch.optim.SGD(model.parameters(), lr=0.0))
    expected, count = 0.0, 0
    for step in range(1, 60):
        with torch.no_grad():
            model.weight.fill_(step * step)
        mean.step(lambda: None)
        if step >= FIRST_STEPS and step % average.EVERY == 0:
            share = average.SHARE / (average.SHARE + count)
            expected, count = expected + share * (step * step - expected), count + 1
    mean.eval()
    assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    mean.train()
    assert model.weight.item() == 59 * 59
