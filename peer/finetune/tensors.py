"""A model's trainable tensors as every peer of a run holds them, and the model a step away.

*Master*: the values that are hashed, in the run's type. float32: a step is added and rounded to
nearest. bfloat16: the step is added in float32 and the sum rounded up or down at random, by sixteen
bits that the step's number stands for; rounding to nearest would drop every step that is smaller
than half a last place, which in bfloat16 is nearly all of them. Both are exact rules, so replicas
stay equal whatever they calculate with: `compute` is a peer's own business.

*Perturbed in passing*: adding +eps z, -2 eps z and +eps z in place does not bring the values back,
because sums are rounded. So nothing is added in place. While a module runs forward, its own
tensors are replaced by shifted copies, and afterwards put back as they were. That needs the memory
of the largest module's tensors, and holds the values to the last bit. Whatever uses a tensor while
its module does not run meets NaN, so no use goes by unperturbed and unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch

from peer.finetune.perturb import Directions, Noise, add_change, chunks, dither

MASTERS: Final[dict[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16}

_NOWHERE: Final = Directions.of([(0, 0.0)])  # through the motions of a step, with no change


class Weights:
    """The tensors of `model` that require gradients. They are the model's own, changed in place."""

    def __init__(
        self,
        model: torch.nn.Module,
        master: str = "fp32",
        noise: Noise = "gaussian",
        compute: torch.dtype | None = None,
    ) -> None:
        """Takes `model` over, and turns its trainable tensors into type `master`.

        `compute`: what the trainable tensors are while a module runs (default: the master's type).

        Raises:
            ValueError: nothing is trainable, or a tensor is not of floats.
        """
        self.model = model
        self.noise = noise
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no trainable tensors")
        for name, parameter in named.items():
            if not parameter.is_floating_point():
                raise ValueError(f"{name} is of {parameter.dtype}, not of floats")
            parameter.data = parameter.data.to(MASTERS[master]).contiguous()
        self.names: Final = tuple(sorted(named, key=str.encode))
        self._parameters = {name: named[name] for name in self.names}
        self._masters = {name: named[name].data for name in self.names}
        self._master = master
        self._compute = compute or MASTERS[master]
        self._owners: list[tuple[torch.nn.Module, tuple[str, ...]]] | None = None
        self._depth = dict.fromkeys(self.names, 0)

    @property
    def numel(self) -> int:
        """How many trainable values there are."""
        return sum(tensor.numel() for tensor in self._masters.values())

    @property
    def traced(self) -> bool:
        """Whether `trace` was called."""
        return self._owners is not None

    def apply(self, step: Directions, dither_seed: int) -> None:
        """Master values += step, in place. `dither_seed`: what bfloat16 is rounded by."""
        if not len(step):
            return
        for name, tensor in self._masters.items():
            flat = tensor.view(-1)
            for start, stop in chunks(flat.numel()):
                moved = self._moved(flat[start:stop], name, start, step)
                if self._master == "bf16":
                    bits = dither(name, stop - start, dither_seed, start, flat.device)
                    moved = _round_by(moved, bits)
                flat[start:stop] = moved

    def rebuild(self, base: Mapping[str, torch.Tensor], step: Directions) -> None:
        """Master values = base + step, rounded to nearest. `base`: a tensor for each name, of the
        master's type; it may be memory-mapped, and is read once."""
        for name, tensor in self._masters.items():
            flat, origin = tensor.view(-1), base[name].reshape(-1)
            for start, stop in chunks(flat.numel()):
                piece = origin[start:stop].to(flat.device)
                flat[start:stop] = self._moved(piece, name, start, step)

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) over names, shapes, type and values."""
        total = hashlib.sha256()
        for name, tensor in self._masters.items():
            total.update(json.dumps([name, list(tensor.shape), self._master]).encode())
            whole = torch.int32 if self._master == "fp32" else torch.int16
            flat = tensor.view(-1).view(whole)
            for start, stop in chunks(flat.numel()):
                total.update(flat[start:stop].cpu().numpy().astype(f"<i{flat.itemsize}").data)
        return total.digest()

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the master values, on the CPU."""
        return {name: t.detach().to("cpu", copy=True) for name, t in self._masters.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the master values.

        Raises:
            ValueError: names, shapes or types are not these weights'.
        """
        if set(state) != set(self.names):
            raise ValueError(f"not these weights' tensors: {sorted(set(state) ^ set(self.names))}")
        for name, tensor in self._masters.items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(f"{name}: {tuple(state[name].shape)} of {state[name].dtype}")
        for name, tensor in self._masters.items():
            tensor.copy_(state[name])

    # ── running the model a step away ────────────────────────────────────────────────────────
    def trace(self, run: Callable[[], torch.Tensor]) -> None:
        """Find out, by two runs of the model, which modules run: each tensor belongs to the
        innermost that does. (Attention may use a projection's tensors without calling it.)

        Raises:
            ValueError: a tensor is used where the module that it belongs to does not run.
        """
        ran: set[torch.nn.Module] = set()

        def note(module: torch.nn.Module, _: Any) -> None:
            ran.add(module)

        handles = [m.register_forward_pre_hook(note) for m in self.model.modules()]
        try:
            with torch.no_grad():
                plain = float(run())
        finally:
            for handle in handles:
                handle.remove()
        self._owners = self._find_owners(ran)
        with self.moved(_NOWHERE):
            passing = float(run())
        if math.isfinite(plain) and not math.isfinite(passing):
            self._owners = None
            raise ValueError(
                "the model uses a trainable tensor outside the module that holds it; only tensors "
                "used while their module runs can be trained this way"
            )

    @contextmanager
    def moved(self, step: Directions) -> Iterator[None]:
        """Inside the block the model runs with master values + step, without gradients.

        Raises:
            RuntimeError: `trace` was not called.
        """
        if self._owners is None:
            raise RuntimeError("call trace() first: it finds out which modules run")
        if not len(step) and self._compute == MASTERS[self._master]:
            with torch.no_grad():
                yield
            return
        handles = []
        nan = torch.tensor(math.nan, dtype=self._compute)
        nowhere = {name: nan.to(t.device).expand(t.shape) for name, t in self._masters.items()}
        try:
            self._put(nowhere)
            for module, names in self._owners:

                def enter(_: Any, __: Any, names: tuple[str, ...] = names) -> None:
                    self._enter(names, step)

                def leave(_: Any, __: Any, ___: Any, names: tuple[str, ...] = names) -> None:
                    self._leave(names, nowhere)

                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._depth = dict.fromkeys(self.names, 0)  # whatever was raised
            self._put(self._masters)

    def _find_owners(
        self, ran: set[torch.nn.Module]
    ) -> list[tuple[torch.nn.Module, tuple[str, ...]]]:
        name_of = {id(parameter): name for name, parameter in self._parameters.items()}
        modules = dict(self.model.named_modules())
        owners: dict[torch.nn.Module, list[str]] = {}
        for path, module in modules.items():
            mine = [name_of[id(p)] for p in module.parameters(recurse=False) if id(p) in name_of]
            if not mine:
                continue
            while path and modules[path] not in ran:
                path = path.rpartition(".")[0]
            held = owners.setdefault(modules[path], [])
            held += [name for name in mine if name not in held]
        return [(module, tuple(names)) for module, names in owners.items()]

    def _enter(self, names: tuple[str, ...], step: Directions) -> None:
        for name in names:
            self._depth[name] += 1
            if self._depth[name] > 1:  # a tied tensor, inside another module that has it too
                continue
            flat = self._masters[name].view(-1)
            copy = torch.empty(flat.shape, dtype=self._compute, device=flat.device)
            for start, stop in chunks(flat.numel()):
                copy[start:stop] = self._moved(flat[start:stop], name, start, step)
            self._parameters[name].data = copy.view(self._masters[name].shape)

    def _leave(self, names: tuple[str, ...], nowhere: Mapping[str, torch.Tensor]) -> None:
        for name in names:
            self._depth[name] -= 1
            if self._depth[name] == 0:
                self._parameters[name].data = nowhere[name]

    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = tensors[name]

    def _moved(self, values: torch.Tensor, name: str, start: int, step: Directions) -> torch.Tensor:
        """values + step in float32: the step's sum first, so that it is rounded into them once."""
        change = torch.zeros(values.shape, device=values.device)
        add_change(change, step, name, start, self.noise)
        return change.add_(values)


def _round_by(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, away from zero with the probability that keeps the mean.

    The sixteen lower bits of a float32 are what bfloat16 drops; added to random ones they carry
    into the upper half just so often. `bits`: int32 in 0..65535.
    """
    carried = values.view(torch.int32) + bits
    return (carried >> 16).to(torch.int16).view(torch.bfloat16)
