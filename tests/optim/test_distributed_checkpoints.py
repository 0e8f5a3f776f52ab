"""torch.distributed.checkpoint in all its forms: a new optimizer goes on to the bit.

In every phase of every configuration, at the switch, and into an optimizer that is in another
phase. Several processes are in ``test_ddp``.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_cases import frozen
from configurations import CONFIGURATIONS, FEW, Configuration
from torch import Tensor, nn

from fuse_ext import LBFGS, Adam, Fuse, FusePV, LossPlateau, Never, prepare_to_load

dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

# A single process saves alone, which torch says each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True, cpu_offload=True)
# What was gathered and flattened torch loads as flattened alone; as both it fails for its own Adam
# too.
FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Run:
    """A small network, its optimizer, and a loop whose batches follow from the step's number."""

    def __init__(self, make: Callable[[Any], Any], driver: str = "closure") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self.optimizer = make(self.model.parameters())
        self.driver, self.count = driver, 0
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(24, 4, generator=generator)
        self.y = self.x[:, :2] * self.x[:, 2:]
        self.whole = driver == "whole"

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        rows = slice(None) if self.whole else torch.arange(12).add(5 * self.count).remainder(24)
        loss = (self.model(self.x[rows]) - self.y[rows]).square().mean()
        loss.backward()
        return loss.detach()

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.step(self.closure)
            self.count += 1
        return self

    @property
    def all(self) -> Any:
        """Everything that may differ."""
        return frozen([self.model.state_dict(), self.optimizer.state_dict()])


def in_memory(run: Run, other: Run, folder: Path) -> None:
    saved = copy.deepcopy(get_state_dict(run.model, run.optimizer))
    set_state_dict(
        other.model, other.optimizer, model_state_dict=saved[0], optim_state_dict=saved[1]
    )


def full(run: Run, other: Run, folder: Path) -> None:
    saved = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=FULL))
    prepare_to_load(other.model, other.optimizer, saved)
    set_optimizer_state_dict(other.model, other.optimizer, saved, options=FULL)


def flattened(run: Run, other: Run, folder: Path) -> None:
    file = io.BytesIO()
    torch.save(get_optimizer_state_dict(run.model, run.optimizer, options=FLAT), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    prepare_to_load(other.model, other.optimizer, saved)
    set_optimizer_state_dict(other.model, other.optimizer, saved, options=FLATTENED)


def through_files(options: StateDictOptions | None) -> Callable[[Run, Run, Path], None]:
    def move(run: Run, other: Run, folder: Path) -> None:
        saved = {"app": {"optimizer": _get(run, options), "model": run.model.state_dict()}}
        dcp.save(saved, checkpoint_id=folder)
        reader = dcp.FileSystemReader(folder)
        prepare_to_load(other.model, other.optimizer, reader.read_metadata())
        into = {"app": {"optimizer": _get(other, options)}}
        dcp.load(into, storage_reader=reader)
        set_optimizer_state_dict(
            other.model, other.optimizer, into["app"]["optimizer"], options=options
        )

    return move


def _get(run: Run, options: StateDictOptions | None) -> Any:
    return get_optimizer_state_dict(run.model, run.optimizer, options=options)


FORMS = {
    "in memory": in_memory,
    "full": full,
    "flattened": flattened,
    "files": through_files(None),
    "files, flattened": through_files(FLATTENED),
}


def go_on(run: Run, make: Callable[[Any], Any], form: str, folder: Path, warm: int = 0) -> None:
    """Moves a run to another optimizer, of ``warm`` steps, and compares what both do then."""
    twin = copy.deepcopy(run)  # test_checkpoints holds deepcopy to the same
    other = Run(make, run.driver).train(warm)
    with torch.no_grad():
        for theirs, ours in zip(other.model.parameters(), run.model.parameters(), strict=True):
            theirs.copy_(ours)
    other.count = run.count
    FORMS[form](run, other, folder)
    assert frozen(other.optimizer.state_dict()) == frozen(twin.optimizer.state_dict())
    for each in (twin, other):
        each.optimizer.zero_grad()  # both evaluate where they are
    assert other.train(5).all == twin.train(5).all


def driver_of(config: Configuration) -> str:
    return "whole" if config.full_batch else "batches"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: config.id)
def test_every_configuration_goes_on(config: Configuration, form: str, tmp_path: Path) -> None:
    run = Run(config.make, driver_of(config)).train(config.steps)
    go_on(run, config.make, form, tmp_path)


KINDS: dict[str, Callable[[Any], Any]] = {
    "living": lambda p: FusePV(p, lr=1e-2, switch=FEW, deterministic=False, metric="kronecker"),
    "pairs": lambda p: FusePV(p, lr=1e-2, switch=FEW, deterministic=True, curvature="pairs"),
    "dense": lambda p: FusePV(p, lr=1e-2, switch=FEW, deterministic=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, FEW - 1, FEW, FEW + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_around_the_switch(kind: str, steps: int, form: str, tmp_path: Path) -> None:
    driver = "batches" if kind == "living" else "whole"
    go_on(Run(KINDS[kind], driver).train(steps), KINDS[kind], form, tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", [2, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_into_an_optimizer_in_the_other_phase(
    kind: str, before: int, form: str, tmp_path: Path
) -> None:
    driver = "batches" if kind == "living" else "whole"
    run = Run(KINDS[kind], driver).train(before)
    go_on(run, KINDS[kind], form, tmp_path, warm=14 - before)


@pytest.mark.parametrize("saving", KINDS)
@pytest.mark.parametrize("loading", [*KINDS, "new"])
def test_full_states_that_torch_mixes_with_what_is_there(saving: str, loading: str) -> None:
    """As it does where nothing was prepared; counts of Adam's steps alone have to be there."""
    run = Run(KINDS[saving], "batches" if saving == "living" else "whole").train(12)
    kind = saving if loading == "new" else loading
    other = Run(KINDS[kind], "batches" if kind == "living" else "whole")
    other.train(0 if loading == "new" else 12)
    saved = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=FULL))
    if saving == "living" and loading not in ("living", "new"):
        prepare_to_load(other.model, other.optimizer, saved)
    set_optimizer_state_dict(other.model, other.optimizer, saved, options=FULL)
    assert frozen(other.optimizer.state_dict()) == frozen(run.optimizer.state_dict())


@pytest.mark.parametrize("kind", [Adam, FusePV, Fuse, LBFGS])
def test_in_one_phase_nothing_need_be_prepared(kind: Any, tmp_path: Path) -> None:
    """Of LBFGS and Fuse too, which have but one: a step with lr = 0 makes their state."""

    def make(params: Any) -> Any:
        return kind(params, lr=1e-2, **({"switch": LossPlateau()} if kind is FusePV else {}))

    run, other = Run(make, "whole").train(30), Run(make, "whole")
    dcp.save({"optimizer": _get(run, None)}, checkpoint_id=tmp_path)
    before = [p.detach().clone() for p in other.model.parameters()]
    state = {"optimizer": _get(other, None)}
    assert frozen(before) == frozen(list(other.model.parameters()))
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"])
    assert frozen(other.optimizer.state_dict()) == frozen(run.optimizer.state_dict())


def test_a_state_that_was_left_out_is_missed(tmp_path: Path) -> None:
    """Loading by the names of a new optimizer, torch leaves out the others without a word."""
    run = Run(KINDS["living"], "batches").train(30)
    other = Run(KINDS["living"], "batches")
    dcp.save({"optimizer": _get(run, None)}, checkpoint_id=tmp_path)
    state = {"optimizer": _get(other, None)}
    dcp.load(state, checkpoint_id=tmp_path)
    before = frozen(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"lacks \['row_factor'.*prepare_to_load"):
        set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"])
    assert frozen(other.optimizer.state_dict()) == before


def test_a_prepared_optimizer_waits(tmp_path: Path) -> None:
    run, other = (Run(KINDS["dense"], "whole") for _ in range(2))
    saved = _get(run.train(8), None)
    prepare_to_load(other.model, other.optimizer, saved)
    with pytest.raises(RuntimeError, match="prepare_to_load was called: load the state"):
        other.train(1)
    set_optimizer_state_dict(other.model, other.optimizer, copy.deepcopy(saved))
    other.train(1)


def test_where_the_state_is(tmp_path: Path) -> None:
    run, other = (Run(KINDS["dense"], "whole") for _ in range(2))
    saved = {"a": {"first": _get(run.train(3), None), "second": _get(run.train(5), None)}}
    dcp.save(saved, checkpoint_id=tmp_path)
    found = dcp.FileSystemReader(tmp_path).read_metadata()
    with pytest.raises(ValueError, match=r"under=None.*\['a\.first', 'a\.second'\]"):
        prepare_to_load(other.model, other.optimizer, found)
    with pytest.raises(ValueError, match=r"under='second'.*\['a\.first', 'a\.second'\]"):
        prepare_to_load(other.model, other.optimizer, found, "second")
    prepare_to_load(other.model, other.optimizer, found, "a.second")
    first = next(iter(other.model.parameters()))
    assert "matrix" in other.optimizer.state[first]
    with pytest.raises(ValueError, match="no state of these parameters"):
        prepare_to_load(other.model, other.optimizer, {"model": {"0.weight": first}})


def test_a_checkpoint_of_files_from_before_there_was_a_record(tmp_path: Path) -> None:
    make = KINDS["dense"]
    run, other = Run(make, "whole").train(9), Run(make, "whole")
    saved = _get(run, None)
    live = run.optimizer.state[next(iter(run.model.parameters()))]
    saved["state"] = {"0.weight": {k: v for k, v in live.items() if k != "record"}}
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    reader = dcp.FileSystemReader(tmp_path)
    prepare_to_load(other.model, other.optimizer, reader.read_metadata())
    into = {"optimizer": _get(other, None)}
    dcp.load(into, storage_reader=reader)
    set_optimizer_state_dict(other.model, other.optimizer, into["optimizer"])
    assert frozen(other.optimizer.state_dict()) == frozen(run.optimizer.state_dict())


def test_words_of_a_group_become_dtypes_again() -> None:
    def make(params: Any) -> Any:
        return FusePV(params, 1e-2, Never(), history_dtype=torch.int8, trial_errors=(OSError,))

    run, other = Run(make).train(2), Run(lambda p: FusePV(p, 1e-2, Never()))
    saved = run.optimizer.state_dict()
    assert saved["param_groups"][0]["history_dtype"] == "torch.int8"
    assert saved["param_groups"][0]["trial_errors"] == ()
    other.optimizer.load_state_dict(saved)
    assert other.optimizer.param_groups[0]["history_dtype"] is torch.int8
    assert run.optimizer.param_groups[0]["trial_errors"] == (OSError,)


# --- frozen parameters ----------------------------------------------------------------------------


def freeze(run: Run, whether: bool, layer: int = 0) -> Run:
    """Freezes or thaws a layer; the first one's entry holds what belongs to all."""
    run.model[layer].requires_grad_(not whether)
    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_frozen_layers_have_is_not_lost(
    kind: str, layer: int, form: str, tmp_path: Path
) -> None:
    """torch leaves out the state of parameters that require no gradient."""
    driver = "batches" if kind == "living" else "whole"
    run = freeze(Run(KINDS[kind], driver).train(FEW + 3), True, layer).train(4)
    twin, other = copy.deepcopy(run), freeze(Run(KINDS[kind], driver), True, layer)
    other.model.load_state_dict(run.model.state_dict())
    other.count = run.count
    FORMS[form](run, other, tmp_path)
    for whether in (True, False):
        for each in (twin, other):
            each.optimizer.zero_grad()
            freeze(each, whether, layer).train(4)
        assert other.all == twin.all


def test_a_layer_thawed_before_loading(tmp_path: Path) -> None:
    run = freeze(Run(KINDS["pairs"], "whole"), True).train(FEW + 4)
    other = Run(KINDS["pairs"], "whole")
    other.model.load_state_dict(run.model.state_dict())
    other.count = run.count
    FORMS["files"](run, other, tmp_path)
    freeze(run, False).optimizer.zero_grad()
    assert other.train(4).all == run.train(4).all


def test_saved_before_frozen_layers_entrusted_theirs() -> None:
    run = freeze(Run(KINDS["pairs"], "whole"), True).train(FEW + 4)
    saved = run.optimizer.state_dict()
    entry = saved["state"][2]
    assert {"0:history", "0:record"} <= entry.keys() and not saved["state"][0]
    saved["state"][0] = {name[2:]: entry.pop(name) for name in list(entry) if name[:2] == "0:"}
    other = freeze(Run(KINDS["pairs"], "whole"), True)
    other.optimizer.load_state_dict(saved)
    assert frozen(other.optimizer.state_dict()) == frozen(run.optimizer.state_dict())


def test_values_of_a_parameter_that_there_is_not() -> None:
    run = freeze(Run(KINDS["pairs"], "whole"), True).train(FEW + 4)
    saved = run.optimizer.state_dict()
    before = frozen(saved)
    saved["state"][2]["4:history"] = torch.zeros(1)
    with pytest.raises(ValueError, match="'4:history' is of parameter 4, but there are 4"):
        run.optimizer.load_state_dict(saved)
    del saved["state"][2]["4:history"]
    assert frozen(run.optimizer.state_dict()) == before
    named = {"optimizer": {"state": {"2.weight": {"9:history": torch.zeros(1)}}}}
    with pytest.raises(ValueError, match="'9:history' is of parameter 9, but there are 4"):
        prepare_to_load(run.model, run.optimizer, named)


def test_where_all_is_frozen_nothing_is_moved() -> None:
    run = Run(KINDS["pairs"], "whole").train(FEW + 4)
    run.model.requires_grad_(False)
    assert "history" in run.optimizer.state_dict()["state"][0]
