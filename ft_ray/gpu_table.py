"""The table of GPUs: capability and a typical price, read from gpus.yaml, which carries sources and dates."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ft_ray import strict_yaml
from ft_ray.errors import InputError

__all__ = ["Gpu", "find", "table"]

RESERVED_MIB = 512
"""What the driver keeps of the memory that nvidia-smi calls total. Torch then says 39.4 to 39.6 GiB of an A100 of 40
GiB and 79.1 of an H100's 79.6 (from memory, not measured here); other cards are taken to be alike."""

_FILE = Path(__file__).with_name("gpus.yaml")


class Gpu(BaseModel):
    """One card. Units are in the names; `tflops` is dense bf16 (fp16 where `bf16` is false)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory_mib: int = Field(gt=0)
    tflops: float = Field(gt=0)
    bf16: bool
    bandwidth_gbs: float = Field(gt=0)
    link_gbs: float = Field(gt=0)
    pcie_gbs: float = Field(gt=0)
    efficiency: float = Field(gt=0, le=1)
    efficiency_basis: str = Field(pattern="^(measured|assumed)$")
    usd_per_hour: float = Field(gt=0)
    price_source: str
    price_date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    price_basis: str = Field(pattern="^(listed|recalled|given)$")

    @property
    def memory(self) -> int:
        """Bytes that a process can have: what the driver reports without what it keeps for itself."""
        return (self.memory_mib - RESERVED_MIB) * 2**20

    def priced(self, usd_per_hour: float) -> Gpu:
        """The same card at the user's price."""
        return self.model_copy(update={"usd_per_hour": usd_per_hour, "price_source": "given", "price_basis": "given"})


@functools.cache
def table() -> dict[str, Gpu]:
    """All cards by name, in the file's order."""
    document = strict_yaml.parse(_FILE.read_text(encoding="utf-8"), _FILE.name)
    return {name: Gpu(name=name, **entry) for name, entry in document.value["gpus"].items()}


def _plain(name: str) -> str:
    return re.sub(r"nvidia|tesla|geforce|[^a-z0-9]", "", name.lower())


def find(name: str) -> Gpu:
    """The card called `name`: 'a100-40gb', 'A100 40GB' and 'NVIDIA A100 40GB' are one.

    A part that only one card has is enough ('h100', '4090'). Raises InputError with the nearest name.
    """
    wanted = _plain(name)
    cards = {_plain(key): gpu for key, gpu in table().items()}
    if wanted in cards:
        return cards[wanted]
    having = [gpu for key, gpu in cards.items() if wanted and wanted in key]
    if len(having) == 1:
        return having[0]
    if having:
        raise InputError(f"GPU {name!r} is several cards: say one of {', '.join(gpu.name for gpu in having)}.")
    raise InputError(f"GPU {name!r} is not in the table{strict_yaml.nearest(name.lower(), table())}.")
