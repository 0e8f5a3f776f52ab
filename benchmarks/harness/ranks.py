"""How a process that has worked with others over torch.distributed ends."""

from __future__ import annotations

import os
import sys

from torch import distributed as dist


def leave(code: int = 0) -> None:
    """Waits for the others, leaves the group, and ends the process with this exit code.

    At once, past Python's own end: DistributedDataParallel keeps the group alive for good
    (torch 2.14: its threads still run after ``destroy_process_group``, whatever is collected), and
    a thread of it that lets go of a tensor while Python ends aborts the process ("terminate called
    without an active exception"; under load one run in some hundred).
    """
    device = None
    if dist.get_backend() == "nccl":
        device = [int(os.environ["LOCAL_RANK"])]
    dist.barrier(device_ids=device)  # nobody leaves while another may still talk to it
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
