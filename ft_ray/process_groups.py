"""How long a rank waits for the others."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["share_timeout"]


def share_timeout() -> None:
    """Gives groups that are made later without a timeout, as DeepSpeed's are, that of the group of all ranks.

    torch has a constant for them: 10 minutes with NCCL, 30 with gloo (torch.distributed.constants), whatever
    `resources.timeout` says. Ranks that wait in one of DeepSpeed's groups for a lost one would wait that long.
    """
    from torch.distributed import distributed_c10d

    if not distributed_c10d.is_initialized():
        return
    group: Any = distributed_c10d._get_default_group()
    device = torch.device("cuda" if distributed_c10d.get_backend() == "nccl" else "cpu")
    constants: Any = distributed_c10d
    constants.default_pg_timeout = constants.default_pg_nccl_timeout = group._get_backend(device).options._timeout
