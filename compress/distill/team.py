"""The processes that train together: one, or those that `accelerate launch` (on CPUs torchrun) started."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import torch

from llmc.console import set_quiet
from llmc.errors import UserError
from llmc.machine import torch_device

PATIENCE = timedelta(days=1)  # the first process may sample text for hours while the others wait


def join_team(device: str) -> tuple[Any, torch.device]:
    """Returns (accelerate's Accelerator, the device of this process). Only the first process prints. UserError if accelerate
    splits a model over processes or gives this process another device than `device`."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    # llmc sets device and precision itself: several runs in one Python process may use different ones
    accelerator = Accelerator(device_placement=False, mixed_precision="no", cpu=launched and device == "cpu",
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if accelerator.num_processes == 1:
        return accelerator, torch_device(device)
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if not kind.startswith("MULTI_"):
        raise UserError(f"accelerate is configured for {kind}, which splits a model over processes",
                        "use `accelerate launch --multi_gpu` or torchrun: then each process has a whole copy")
    own = accelerator.device
    if device != "gpu" and torch.device(device).type != own.type:
        raise UserError(f"--device {device}: accelerate assigned {own} to this process", "use --device gpu")
    if not accelerator.is_main_process:
        set_quiet(True)
    atexit.unregister(_leave)
    atexit.register(_leave)
    return accelerator, own


def _leave() -> None:
    """End the group while Python still runs: its threads end a process by SIGABRT if they are alive when C++ is torn down."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
