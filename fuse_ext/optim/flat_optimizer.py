"""The base of our optimizers: torch.optim's contract over a flat state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fuse_ext.curvature.moments import check_moments_fit
from fuse_ext.kernels import hooks, ops
from fuse_ext.objective.step_options import default_evaluations
from fuse_ext.optim.checkpoint.frozen import entrust, reclaim
from fuse_ext.optim.checkpoint.record import RECORD, empty_record, opened, pack
from fuse_ext.optim.checkpoint.shards import divide, join
from fuse_ext.optim.options import Table, in_words, out_of_words
from fuse_ext.phase import conversion
from fuse_ext.phase.modes import check_ranks
from fuse_ext.phase.protocol import Phase
from fuse_ext.vector.checks import listed
from fuse_ext.vector.flat import FlatParams, ParamGroup
from fuse_ext.vector.narrow.masters import give_up_masters
from fuse_ext.vector.ranks import Said
from fuse_ext.vector.rows.rows import step_gathered
from fuse_ext.vector.shards import is_dtensor


class FlatOptimizer(Optimizer, ABC):
    """What our optimizers share: flat state, its checkpoints, and the choice of kernels.

    Subclasses keep their tensors in ``self.state`` as usual, usually as views of flat buffers,
    and rebuild the buffers from there in :meth:`_adopt_state`, so that ``state_dict``, ``pickle``
    and ``copy.deepcopy`` work as for any torch optimizer, and bit for bit.
    """

    _table: ClassVar[Table]
    _phase: Phase | None = None
    _loss: Any = None  # that of the last step

    # torch calls it on ``step`` when the first object of a class is made.
    profile_hook_step = staticmethod(hooks.noticed)
    shares_steps = False  # whether each rank takes a part of it: see take_step

    def __init__(
        self, params: Any, defaults: dict[str, Any], backend: str, process_group: Any = None
    ) -> None:
        self._backend, self._said = backend, Said(process_group)
        self._incoming: dict[str, Any] | None = None
        self._waiting: RemovableHandle | None = None  # for a state: see await_state
        self._flat: FlatParams | None = None
        if backend not in ops.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(ops.BACKENDS)}, got {backend!r}")
        super().__init__(listed(params), defaults)
        self._check_groups(self.param_groups)
        self._renew_layout()

    def _renew_layout(self) -> None:
        """Lays the parameters out as they are now; state made for another layout is void then."""
        flat = FlatParams(self.param_groups, self._said.group)
        check_ranks(self.param_groups[0], flat)
        check_moments_fit(self.param_groups[0].get("moment_dtype"), flat.params)
        self._flat, self.shares_steps = flat, flat.rows is not None
        self._ops = ops.select(self._backend, self._flat.device)

    def take_step(
        self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A step; one of rows (``shard_state``) ends, and calls its closures, with all of them."""
        if not self.shares_steps:
            return step(self, *args, **kwargs)
        return step_gathered(lambda: self.flat.gather(), step, (self, *args), kwargs)

    def _check_groups(self, groups: list[ParamGroup]) -> None:
        """Raises ValueError or TypeError unless these could be this optimizer's groups."""
        self._table.check_groups(groups)

    @property
    def flat(self) -> FlatParams:
        """The layout of the flat state."""
        assert self._flat is not None
        return self._flat

    @property
    def _entry(self) -> dict[str, Any]:
        """The state that belongs to all parameters lies with the first, as torch's LBFGS does."""
        entry: dict[str, Any] = self.state[self.flat.params[0]]
        if RECORD not in entry:  # torch's unflattening asks for the names that are there
            entry[RECORD] = empty_record()
        return entry

    def _own_group(self, param_group: ParamGroup) -> ParamGroup:
        """A copy of the caller's group, who may use it for another optimizer too.

        State of the optimizer that it comes from, if it comes from one, stays behind.
        """
        group = own_group(param_group)
        for option in self._table.options:
            if option.state:
                group.pop(option.name, None)
        if self.__dict__.get("_flat") is not None:
            for name in self._table.shared:  # what they must agree on, and nothing else was said
                group.setdefault(name, self.param_groups[0][name])
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the new parameters' state starts empty, the others' stays.

        The dictionary is copied: set options in ``param_groups``. A tensor that comes twice in it
        counts once.
        """
        if isinstance(param_group, dict):  # of anything else torch says what it thinks
            param_group = self._own_group(param_group)
        self._settle()
        super().add_param_group(param_group)
        _drop_repeats(param_group)
        before = self.__dict__.get("_flat")
        if before is None:
            return
        try:
            self._check_groups(self.param_groups)
            self._renew_layout()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        entry = self.state.get(self.flat.params[0], {})
        if "history" in entry and before.total != self.flat.total:
            # Fits nothing: curvature starts afresh on all ranks, also where none of it lies here.
            entry["history"] = entry["history"].new_empty(2, 0, self.flat.numel + 1)
        self._note_group(before)
        self._adopt_state()

    def _note_group(self, before: FlatParams) -> None:
        """Does what a group added to the parameters ``before`` asks for besides."""
        return None

    def new_objective(self) -> None:
        """Says that the closure is another function from the next step on.

        To be called where collocation points are drawn anew, data, targets or the loss's weights
        change, as often as they do. What is known of the curvature stays; an evaluation that is
        remembered goes, no pair mixes two functions, and a run that had nothing left to gain goes
        on. In the Adam phase it has no effect. (Unsaid, a change is noticed where a trial does
        not fit what is remembered, which costs up to two evaluations more.)
        """
        if self._phase is not None:
            self._phase.new_objective()

    @hooks.without_grad
    def continue_in(self, dtype: torch.dtype) -> None:
        """Goes on in a more exact dtype, where rounding has ended the run (:meth:`report`).

        The model's buffers and the data are the user's to convert::

            model.double()
            x, y = x.double(), y.double()
            optimizer.continue_in(torch.float64)

        Parameters that have not been converted are, in place, with the gradients at hand, and so
        is all state: moments, curvature, counters. No value changes, but that parameters
        become their master weights where they have some. What was learnt of the loss's rounding is
        forgotten, the next step evaluates anew, and a run that had nothing left to gain goes on,
        which is why this is not called ``to``. Options stay, but for ``moment_dtype``, which is
        None in float64. After a checkpoint of float32 has been loaded for a model in float64 it
        does the same. CUDA graphs have to be captured anew.

        Args:
            dtype: torch.float64; or torch.float32, where parameters are narrower. Complex
                parameters become pairs of it.

        Raises:
            TypeError, ValueError: It is another one, or less exact than a parameter or the state;
                or a parameter has changed by more than its dtype. Nothing changes then.
        """
        conversion.check_conversion(self.flat, self.param_groups, dtype, bool(self.state))
        self._settle()
        conversion.convert_params(self.param_groups, dtype)
        give_up_masters(self.flat, self.state)
        if dtype == torch.float64:
            for group in [self.defaults, *self.param_groups]:
                if "moment_dtype" in group:
                    group["moment_dtype"] = None
        self._renew_layout()
        conversion.forget_rounding(self.state.get(self.flat.params[0], {}))
        self._adopt_state()

    def _noted(self, loss: Any) -> Any:
        """A step's loss, of which the report will tell."""
        self._loss = loss.detach() if getattr(loss, "requires_grad", False) else loss
        return loss

    @property
    def _last_loss(self) -> float | None:
        return None if self._loss is None else float(self._loss)

    @abstractmethod
    def _adopt_state(self) -> None:
        """Rebuilds flat buffers from ``self.state``."""

    def _settle(self) -> None:
        """Writes into ``self.state`` what is counted on the device alone."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """As in torch."""
        if self._waiting is None:
            self._settle()
        saved = super().state_dict()
        saved["param_groups"] = list(map(in_words, saved["param_groups"]))
        kinds = {param.is_complex() for param in self.flat.params}
        if len(kinds) > 1:  # torch.save takes no storage that is seen in two dtypes
            saved["state"] = _map_tensors(saved["state"], _own_if_complex)
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        if self.flat.spread and self._waiting is None:
            saved["state"] = divide(saved["state"], keys, self.flat, self.param_groups)
        if self._waiting is None and RECORD in saved["state"].get(keys[0], {}):
            packed = pack(saved["state"], keys, self.flat.device)
            saved["state"] = entrust(packed, keys, self.flat.params)
        return saved

    def await_state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Holds a state that only has the form of one which ``load_state_dict`` is to bring.

        Until then the optimizer takes no step. See :func:`fuse_ext.prepare_to_load`.
        """
        self._stop_waiting()
        self._phase = None
        # torch asks for an entry of every parameter.
        self.state = defaultdict(dict, {param: state.get(param, {}) for param in self.flat.params})
        self._waiting = self.register_step_pre_hook(_refuse_to_step)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    @abstractmethod
    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError, naming the entry, for a state that is not of this optimizer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state keeps its own dtype and nothing changes if it does not fit.

        Raises:
            ValueError, TypeError: The state is of another optimizer, or of other parameters, or
                an option in it is out of range.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")

        def receive(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            incoming = dict(incoming)  # it may be the one that a hook of the user's has kept
            self._check_incoming_groups(incoming)
            keys = [key for group in incoming["param_groups"] for key in group["params"]]
            held = opened(reclaim(incoming["state"], keys), keys)
            incoming["state"] = join(held, keys, self.flat, incoming["param_groups"])
            self._check_state_dict(incoming)
            self._incoming = incoming
            return incoming

        # A hook sees the dictionary after the user's own hooks. torch would then cast the state
        # to the parameters' dtype; __setstate__ takes it from here instead.
        handle = self.register_load_state_dict_pre_hook(receive)
        try:
            super().load_state_dict(state_dict)
            self._stop_waiting()
        finally:
            handle.remove()
            self._incoming = None

    def _check_incoming_groups(self, state_dict: dict[str, Any]) -> None:
        for key, kind in (("state", dict), ("param_groups", list)):
            if key not in state_dict:
                raise ValueError(f"state_dict has no {key!r}, only {sorted(map(str, state_dict))}")
            if not isinstance(state_dict[key], kind):
                raise TypeError(
                    f"state_dict[{key!r}] must be a {kind.__name__}, got "
                    f"{type(state_dict[key]).__name__}"
                )
        groups = state_dict["param_groups"]
        for i, group in enumerate(groups):
            for name in ("params", *self._table.required):
                if name not in group:
                    raise ValueError(
                        f"state_dict is not of {type(self).__name__}: param_groups[{i}] has no "
                        f"{name!r}, only {sorted(map(str, group))}"
                    )
        ours = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) for group in groups]
        if ours != theirs:
            raise ValueError(
                f"state_dict has parameter groups of {theirs} tensors, the optimizer of {ours}; an "
                "optimizer's state is loaded whole (no strict=False): where layers have come or "
                "gone, begin with a new optimizer"
            )
        groups = [
            {
                **with_possible_max_eval(out_of_words(group)),
                **{name: own[name] for name in self._table.of_process},
            }
            for group, own in zip(groups, self.param_groups, strict=True)
        ]
        state_dict["param_groups"] = groups
        self._check_groups([{**self.defaults, **group} for group in groups])

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        # pickle stores the whole storage of every tensor: views of a flat buffer would each take
        # all of it along.
        state = {key: _map_tensors(entry, _compact) for key, entry in self.state.items()}
        return {
            **super().__getstate__(),
            "state": defaultdict(dict, state),
            "_backend": self._backend,
            "_said": self._said,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        has_option = "differentiable" in state.get("defaults", self.__dict__.get("defaults", {}))
        super().__setstate__(state)
        if not has_option:  # torch adds it to every optimizer's defaults here
            del self.defaults["differentiable"]
        self.__dict__.setdefault("_incoming", None)
        self.__dict__.setdefault("_said", Said())  # of an older pickle
        self.__dict__.setdefault("_waiting", None)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        if self._incoming is not None:
            ids = [i for group in self._incoming["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, param in zip(ids, params, strict=True):
                if i in self._incoming["state"]:
                    self.state[param] = _map_tensors(self._incoming["state"][i], _copy)
        self._renew_layout()
        self._adopt_state()


def _refuse_to_step(*_: Any) -> None:
    raise RuntimeError("prepare_to_load was called: load the state before the next step")


def with_possible_max_eval(group: ParamGroup) -> ParamGroup:
    """The group of a checkpoint, perhaps an older one, with a budget that can be kept.

    Where max_iter=1 torch's default of ``max_iter * 5 // 4`` was saved beside a line search that
    did not keep it.
    """
    searches = (group.get(name) for name in ("line_search", "line_search_fn"))
    if group.get("max_eval") != 1 or all(search in (None, "fixed") for search in searches):
        return group
    return {**group, "max_eval": default_evaluations(1, True, False)}


def own_group(param_group: ParamGroup) -> ParamGroup:
    """A copy of a parameter group."""
    if isinstance(param_group.get("params"), Iterator):
        # As torch does: it would be empty when the caller uses it again.
        param_group["params"] = list(param_group["params"])
    return dict(param_group)


def _drop_repeats(group: ParamGroup) -> None:
    """Keeps the first of each tensor; torch has warned of the others, and steps each time."""
    first: dict[Tensor, int] = {}
    for i, param in enumerate(group["params"]):
        first.setdefault(param, i)
    if len(first) < len(group["params"]):
        for name in group.keys() & {"params", "param_names"}:
            group[name] = [group[name][i] for i in first.values()]


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a state entry with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(entry, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(entry, change) for entry in value)
    return value


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _own_if_complex(tensor: Tensor) -> Tensor:
    return _copy(tensor) if tensor.is_complex() else tensor


def _compact(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a small part of its storage."""
    if is_dtensor(tensor):
        return _copy(tensor)
    return tensor if 2 * tensor.nbytes > tensor.untyped_storage().nbytes() else _copy(tensor)
