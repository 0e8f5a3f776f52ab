"""Ways in which an optimizer goes on elsewhere, and steps to see that it does."""

import copy
import io
import pickle

import torch
from adam_cases import twin


def run(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Steps on a smooth function that couples all parameters, of any dtype."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def closure():
        optimizer.zero_grad()
        parts = [
            (i + 1) * (torch.view_as_real(p) if p.is_complex() else p).float().square().sum()
            for i, p in enumerate(params)
        ]
        loss = torch.stack(parts).sum().add(1.0).log()
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)


def through_torch_save(make, params, optimizer, backend):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = twin(params)
    resumed = make(copies, backend)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return copies, resumed


def through_pickle(make, params, optimizer, backend):
    return pickle.loads(pickle.dumps((params, optimizer)))


def through_deepcopy(make, params, optimizer, backend):
    return copy.deepcopy((params, optimizer))
