"""Runs that are killed while they train and save: a program for ``test_saving``.

It forks one run after the other, each of which goes on from the checkpoint of the one before. A run
says at every event that it has come so far, and waits; after a random number of events it is killed
(SIGKILL) instead of being answered. So it dies between two steps or anywhere in a save, and no time
is waited for. Prints what was found as JSON.

    killed_runs.py FOLDER WAY KILLS SEED
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fuse_ext

SWITCH = 12  # steps before the second phase
MOST_EVENTS = 40  # about six steps with their saves


def make() -> tuple[torch.nn.Module, fuse_ext.FusePV]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return model, fuse_ext.FusePV(model.parameters(), lr=1e-2, switch=SWITCH)


def train_step(model: torch.nn.Module, optimizer: fuse_ext.FusePV, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def digest(saved: Any) -> str:
    """Of all that a checkpoint holds; of tensors their bytes."""
    parts = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            parts.update(bytes(value.contiguous().view(-1).view(torch.uint8).tolist()))
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                parts.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for entry in value:
                add(entry)
        else:
            parts.update(repr(value).encode())

    add(saved)
    return parts.hexdigest()


def in_two_halves(obj: Any, file: Any, event: Callable[[str], None]) -> None:
    """``torch.save``, with an event in the middle of the file."""
    whole = io.BytesIO()
    torch_save(obj, whole)
    content = whole.getvalue()
    file.write(content[: len(content) // 2])
    file.flush()
    event("half written")
    file.write(content[len(content) // 2 :])


torch_save = torch.save


def in_place(obj: Any, path: Path) -> None:
    """As one saves who does not think of it."""
    with open(path, "wb") as file:
        torch.save(obj, file)


WAYS = {"save": fuse_ext.save, "in place": in_place}


def run(path: Path, way: str, event: Callable[[str], None], most: int) -> list[str]:
    """Goes on from the checkpoint and saves after every step, if in a ``way``; the digests."""
    model, optimizer = make()
    first, digests = 0, []
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    torch.save = lambda obj, file: in_two_halves(obj, file, event)
    for name in ("fsync", "replace"):
        call = getattr(os, name)

        def told(*args: Any, name: str = name, call: Any = call) -> None:
            event(f"before {name}")
            call(*args)
            event(f"after {name}")

        setattr(os, name, told)
    for step in range(first, most):
        train_step(model, optimizer, step)
        event("trained")
        saved = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if way:
            WAYS[way](saved, path)
        event(f"saved {step + 1}")
        digests.append(digest(saved))
    return digests


def killed(path: Path, way: str, events: int, most: int) -> tuple[int, str]:
    """A run that dies at this event: the last step that it has said is saved, and where it died."""
    (from_child, to_parent), (from_parent, to_child) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:

            def event(name: str) -> None:
                os.write(to_parent, f"{name}\n".encode())
                os.read(from_parent, 1)

            run(path, way, event, most)
            status = 0
        finally:
            os._exit(status)
    os.close(to_parent)
    saved, name = 0, ""
    with os.fdopen(from_child) as told:
        for count, line in enumerate(told, 1):
            name = line.strip()
            if name.startswith("saved"):
                saved = int(name.split()[1])
            if count == events:
                os.kill(child, signal.SIGKILL)
                break
            os.write(to_child, b"!")
    for pipe in (from_parent, to_child):
        os.close(pipe)
    _, status = os.waitpid(child, 0)
    return saved, name if os.WIFSIGNALED(status) else f"ended with {status}"


def main(folder: Path, way: str, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    draw, path = random.Random(seed), folder / "checkpoint.pt"
    most = kills * MOST_EVENTS  # more than there will be
    died: list[str] = []
    unloadable, lost, steps, kept = 0, 0, 0, []
    for _ in range(kills):
        said, name = killed(path, way, draw.randint(1, MOST_EVENTS), most)
        died.append(name)
        said = max(said, steps)
        if not path.exists():
            lost += said > 0
            continue
        try:
            saved = torch.load(path)
            model, optimizer = make()
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except Exception:
            unloadable += 1
            path.unlink()
            steps = 0
            continue
        lost += saved["step"] < said
        steps = saved["step"]
        kept.append((steps, digest(saved)))
    path.unlink(missing_ok=True)
    straight = run(path, "", lambda name: None, steps)  # forks no more
    return {
        "died": died,
        "unloadable": unloadable,
        "lost": lost,
        "steps": steps,
        "same": all(straight[step - 1] == found for step, found in kept if step <= steps),
        "left": sorted(entry.name for entry in folder.iterdir()),
    }


if __name__ == "__main__":
    folder, way, kills, seed = sys.argv[1:]
    print(json.dumps(main(Path(folder), way, int(kills), int(seed))))
