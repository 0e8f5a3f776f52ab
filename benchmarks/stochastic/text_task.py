"""The next byte of a text as a task: Python's own manual, or any file."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.stochastic.task import Loss, Task, even_marks
from benchmarks.stochastic.transformer import Transformer


@lru_cache(maxsize=2)
def text(path: str | None) -> Tensor:
    """A text's bytes; None for the prose that Python ships for its ``help()``, in ASCII."""
    if path is not None:
        found = Path(path).read_bytes()
    else:
        from pydoc_data.topics import topics

        found = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long()


def digest(path: str | None) -> str:
    """Of a text: releases of Python differ, and a file may change."""
    return hashlib.sha256(bytes(text(path).tolist())).hexdigest()[:12]


def build(options: dict[str, Any], steps: int, seed: int, held_out: bool) -> Task:
    """The task.

    Args:
        options: "text" (a path or None), "digest" (for the stored run to know the text by),
            "context", "batch", "validation" (windows) and "model" (width, layers, heads).
        steps: Of the run.
        seed: Of the batches.
        held_out: The last tenth of the training part takes the place of the validation part, which
            is the last tenth of all.

    Raises:
        ValueError: The text is too short.
    """
    whole, context = text(options["text"]), options["context"]
    part = whole[: _split(len(whole))]
    train, test = part, whole[len(part) :]
    if held_out:
        train, test = part[: _split(len(part))], part[_split(len(part)) :]
    if len(test) <= context + 1:
        raise ValueError(f"text of {len(whole)} bytes is too short for a context of {context}")
    model = Transformer(128 if int(whole.max()) < 128 else 256, context, **options["model"])
    generator = torch.Generator().manual_seed(seed)
    # The same windows for everyone, evenly over the validation part.
    starts = torch.linspace(0, len(test) - context - 1, options["validation"]).long()
    fixed = windows(test, starts, context)

    def batch() -> Loss:
        starts = torch.randint(len(train) - context, (options["batch"],), generator=generator)
        rows = windows(train, starts, context)
        return lambda model: nats(model, rows)

    def judge(step: int) -> dict[str, float]:
        losses = [nats(model, rows).item() * len(rows) for rows in fixed.split(64)]
        return {"loss": sum(losses) / len(fixed)}

    name = "Python's help topics" if options["text"] is None else Path(options["text"]).name
    note = (
        f"{name}, {len(train):,} bytes ({options['digest']}); validation on {len(fixed)} windows "
        f"of {context} bytes of the {len(test):,} after them"
    )
    return Task(model, batch, judge, even_marks(steps), note)


def _split(n: int) -> int:
    return n - n // 10


def windows(of: Tensor, starts: Tensor, context: int) -> Tensor:
    """(n, context + 1) bytes that begin at ``starts``."""
    return of[starts[:, None] + torch.arange(context + 1)]


def nats(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean loss a byte."""
    return cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
