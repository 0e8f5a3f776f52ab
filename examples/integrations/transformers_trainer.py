"""transformers.Trainer: optimizers=(FusePV(...), schedule). It passes no closure, and needs none.

A tiny language model, initialised at random, learns to count.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fuse_ext import FusePV, unwrap

VOCABULARY, LENGTH = 32, 12


class Counting(Dataset):
    """Sequences that count on from any number."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(LENGTH) + i) % VOCABULARY
        return {"input_ids": ids, "labels": ids}


def make(folder: str, steps: int, **arguments: Any) -> Trainer:
    """The trainer of a network of 30,000 parameters."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = FusePV(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    options = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": max(steps // 4, 1),
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=Counting(),
        optimizers=(optimizer, schedule),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder, steps=120)
        trainer.train()
        print(unwrap(trainer.optimizer).report())
