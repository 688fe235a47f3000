"""Where the weights and optimizer states of a rank are, under ZeRO and without: the same view of all of them.

A `Layout` lists which piece of which parameter this rank holds, reads the fp32 values of a piece, and writes them
back. DeepSpeed's inner attributes that this needs are here and nowhere else; DeepSpeed is pinned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ft_ray.errors import TrainingError
from ft_ray.state_files import WEIGHT, Piece, StateFiles

_DIRECT = 512  # bytes: where O_DIRECT can read to; DeepSpeed's O_DIRECT_ALIGNMENT

__all__ = ["Layout", "is_zero", "layout_of", "resident_bytes"]


@dataclass(frozen=True)
class _Slot:
    """A piece, and where it lies: `count` elements from `offset` of the flat tensor number `group`."""

    piece: Piece
    group: int
    offset: int


class Layout(Protocol):
    """This rank's share of the trained parameters; only a step of `inner` changes it."""

    inner: torch.optim.Optimizer

    def pieces(self) -> list[Piece]:
        """What this rank has to save; over all ranks every element once."""
        ...

    def kinds(self) -> list[str]:
        """Optimizer states with a value for each element."""
        ...

    def scalars(self) -> dict[str, float]:
        """Optimizer states that are one number for all."""
        ...

    @property
    def swapped(self) -> bool:
        """Whether any of it lies in files, from which `read` brings one group at a time into memory."""
        ...

    def read(self, kind: str, piece: Piece) -> torch.Tensor:
        """Where the values lie. What was read before may be gone if it is `swapped`."""
        ...

    def release(self) -> None:
        """Lets go of what reading brought into memory."""
        ...

    def load(self, state: StateFiles) -> None:
        """Takes weights and optimizer states over from `state`, whoever wrote it."""
        ...

    def loss_scale(self) -> dict[str, float]: ...


def layout_of(named: dict[str, torch.nn.Parameter], optimizer: Any, stage: int, rank: int, workers: int) -> Layout:
    """The layout of the trained parameters `named` under the (unwrapped) optimizer of a ZeRO stage, 0 for none."""
    if stage == 0:
        return _Whole(named, optimizer, rank, workers)
    return (_Stage3 if stage == 3 else _Stage12)(named, optimizer)


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is one of DeepSpeed's that share states out, and not what wraps it or what it wraps."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    return isinstance(optimizer, ZeROOptimizer)


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters in this process: what is gathered now, and its share of what is sharded."""
    total = 0
    for parameter in model.parameters():
        share = getattr(parameter, "ds_tensor", None)
        total += parameter.numel() * parameter.element_size()
        if share is not None and share.data_ptr() != parameter.data_ptr():
            total += share.numel() * share.element_size()
    return total


def _scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.dim() == 0)


class _Flat:
    """Pieces inside flat tensors, each with one optimizer state: plain parameters and ZeRO's partitions alike."""

    def __init__(self, flats: list[Any], slots: list[_Slot], inner: torch.optim.Optimizer) -> None:
        self.flats, self.slots, self.inner = flats, slots, inner
        self._at = {slot.piece: slot for slot in slots}

    def pieces(self) -> list[Piece]:
        return [slot.piece for slot in self.slots]

    def _first(self) -> tuple[Any, dict[str, Any]]:
        """A flat tensor and its states; all have the same ones."""
        return next(((flat, self.inner.state[flat]) for flat in self.flats if self.inner.state.get(flat)), (None, {}))

    def kinds(self) -> list[str]:
        flat, states = self._first()
        found = []
        for key, value in states.items():
            if _scalar(value):
                continue
            if not isinstance(value, torch.Tensor) or value.numel() != flat.numel():
                raise TrainingError(
                    f"{type(self.inner).__name__} keeps {key!r} in another shape than its weights, which cannot be "
                    "shared out anew: use optim.name adamw_torch."
                )
            found.append(key)
        return found

    def scalars(self) -> dict[str, float]:
        return {key: float(value) for key, value in self._first()[1].items() if _scalar(value)}

    @property
    def swapped(self) -> bool:
        return False

    def release(self) -> None:
        pass

    def read(self, kind: str, piece: Piece) -> torch.Tensor:
        slot = self._at[piece]
        flat = self.flats[slot.group]
        values: torch.Tensor = flat.data if kind == WEIGHT else self.inner.state[flat][kind]
        return values.reshape(-1).narrow(0, slot.offset, piece.count)

    def load(self, state: StateFiles) -> None:
        slots: dict[int, list[_Slot]] = {group: [] for group in range(len(self.flats))}
        for slot in self.slots:
            slots[slot.group].append(slot)
        for group, inside in slots.items():
            self._load(group, inside, state)

    def _load(self, group: int, slots: list[_Slot], state: StateFiles) -> None:
        flat = self.flats[group]
        held = self.inner.state[flat]
        for kind in state.index.kinds:
            known = held.get(kind)
            if isinstance(known, torch.Tensor) and known.shape == flat.shape:
                known.zero_()  # the same tensor: whoever swaps it out knows it already
            else:
                held[kind] = torch.zeros_like(flat.data)
        for key, value in state.index.scalars.items():
            # torch's optimizers count steps in an fp32 tensor on the host, unless they run on the device.
            on_device = any(g.get("fused") or g.get("capturable") for g in self.inner.param_groups)
            held[key] = torch.tensor(value, dtype=torch.float32, device=flat.device if on_device else "cpu")
        for slot in slots:
            piece = slot.piece
            for kind in (WEIGHT, *state.index.kinds):
                if piece.count:
                    self.read(kind, piece).copy_(state.read(kind, piece.name, piece.start, piece.count))

    def loss_scale(self) -> dict[str, float]:
        return {}


class _Whole(_Flat):
    """Every rank holds everything; each saves its share of the parameters."""

    def __init__(self, named: dict[str, torch.nn.Parameter], inner: Any, rank: int, workers: int) -> None:
        pieces = [Piece(name, 0, parameter.numel()) for name, parameter in named.items()]
        slots = [_Slot(piece, group, 0) for group, piece in enumerate(pieces)]
        super().__init__(list(named.values()), slots, inner)
        self._mine = pieces[rank::workers]

    def pieces(self) -> list[Piece]:
        return self._mine


class _Zero(_Flat):
    """What both kinds of ZeRO optimizer have: masters in flat fp32 partitions, and a loss scale under fp16."""

    def __init__(self, flats: list[Any], slots: list[_Slot], outer: Any) -> None:
        super().__init__(flats, slots, outer.optimizer)
        self.outer = outer

    def loss_scale(self) -> dict[str, float]:
        scaler = getattr(self.outer, "loss_scaler", None)
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: float(getattr(scaler, name)) for name in names if hasattr(scaler, name)}

    def load(self, state: StateFiles) -> None:
        super().load(state)
        scaler = getattr(self.outer, "loss_scaler", None)
        for name, value in state.index.loss_scale.items():
            if hasattr(scaler, name):
                setattr(scaler, name, type(getattr(scaler, name))(value))


class _Stage12(_Zero):
    """ZeRO 1 and 2: each rank owns a contiguous range of all parameters of a group, laid end to end."""

    def __init__(self, named: dict[str, torch.nn.Parameter], outer: Any) -> None:
        slots = []
        for name, parameter in named.items():
            at = getattr(parameter, "_hp_mapping", None)
            if at is not None:
                low, high = at.lp_fragment_address, at.hp_fragment_address
                slots.append(_Slot(Piece(name, low.start, low.numel), at.param_group_index, high.start))
        # Stage 1 in bf16 with gradients summed in fp32 is a class of its own.
        flats = getattr(outer, "single_partition_of_fp32_groups", None) or outer.fp32_groups_flat_partition
        super().__init__(flats, slots, outer)

    def load(self, state: StateFiles) -> None:
        super().load(state)
        self.outer.update_lp_params()


class _Stage3(_Zero):
    """ZeRO 3: each rank owns the same share of every parameter, padded to a multiple of the ranks."""

    def __init__(self, named: dict[str, torch.nn.Parameter], outer: Any) -> None:
        slots, shares = [], []
        for name, parameter in named.items():
            group, offset, share = outer.grad_position[outer.get_param_id(parameter)]
            start = outer._get_param_partition_rank(parameter) * share
            count = max(0, min(share, parameter.ds_numel - start))  # type: ignore[attr-defined]  # the rest is padding
            slots.append(_Slot(Piece(name, start, count), int(group), int(offset)))
            shares.append(int(share))
        if outer.swap_optimizer:
            _check_alignment(slots, shares, outer)
        # A group after the other: one that is swapped out is brought in once for all its pieces.
        slots.sort(key=lambda slot: (slot.group, slot.offset))
        super().__init__(outer.fp32_partitioned_groups_flat, slots, outer)
        self._inside: int | None = None

    @property
    def swapped(self) -> bool:
        return bool(self.outer.swap_optimizer)

    def _bring(self, group: int) -> None:
        """Has a group in memory, and no other one that swaps; those below DeepSpeed's least size never leave it."""
        if group != self._inside and self.outer._swappable_optimizer_subgroup(group):
            self.release()
            self.outer._optimizer_states_and_gradient_swap_in(group)
            self._inside = group

    def release(self) -> None:
        if self._inside is not None:
            self.outer._release_swap_buffers(self._inside)  # as it is in the files: nothing was changed
            self._inside = None

    def read(self, kind: str, piece: Piece) -> torch.Tensor:
        self._bring(self._at[piece].group)
        return super().read(kind, piece)

    def _load(self, group: int, slots: list[_Slot], state: StateFiles) -> None:
        self._bring(group)
        super()._load(group, slots, state)
        # As DeepSpeed's own loading does: shares from masters, while these are there.
        self.outer._reassign_or_swap_out_partitioned_parameters(group)
        if self._inside == group:
            self.outer._optimizer_states_and_gradient_swap_out(group)
            self._inside = None

    def load(self, state: StateFiles) -> None:
        super().load(state)
        outer = self.outer
        if outer.persistent_parameters:  # these stay gathered: anew
            outer.persistent_parameters[0].partition(outer.persistent_parameters)
        outer.checkpoint_event_epilogue()


def _check_alignment(slots: list[_Slot], shares: list[int], outer: Any) -> None:
    """DeepSpeed 0.19.8 reads a swapped gradient to its place in the group, wherever that is, and does not notice that
    the kernel refuses to read to an odd one: the step is then made with whatever the buffer held (seen on ext4).
    """
    swapper = outer.optimizer_swapper
    for slot, share in zip(slots, shares, strict=True):
        swaps = outer._swappable_optimizer_subgroup(slot.group) and swapper.is_swappable_tensor(numel=share)
        if swaps and slot.offset * swapper.swap_element_size % _DIRECT:
            raise TrainingError(
                f"DeepSpeed would read the gradient of {slot.piece.name} from NVMe to an address that is no multiple "
                f"of {_DIRECT} bytes, which goes wrong without a word: offload to host memory instead, with "
                "resources.offload_optimizer: true and no device nvme."
            )
