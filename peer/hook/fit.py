"""Whether a script's model is the run's: names, shapes, types, frozen base, adapters' scale.

What a peer sends is added to what others send, value by value, so anything else than the same
layout on the same base would poison both sides. Each refusal names what differs and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch

from peer.errors import UsageError
from peer.manifest import Manifest, MethodSpec

NAMED_MAX: Final = 3  # differences that a message spells out; a model has hundreds of tensors
TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
KINDS: Final = ("pretrain", "lora")
"""Runs in which a script may do the inner steps."""

_ADAPTER: Final = re.compile(r"(?<=\.lora_[AB]\.)[^.]+(?=\.)")


def check_kind(manifest: Manifest) -> None:
    """Raises UsageError where the run's peers do not train by gradients on the run's layout."""
    if manifest.method.kind not in KINDS:
        raise UsageError(
            f"the run is a {manifest.method.kind} run, whose inner steps a script can't make; join"
            " it with `python -m peer join`, or start a run of method.kind lora or pretrain"
        )


def fitting_parameters(
    manifest: Manifest,
    run_model: torch.nn.Module,
    script_model: torch.nn.Module,
    say: Callable[[str], None],
) -> dict[str, torch.nn.Parameter]:
    """The script's trainable parameters by the names that the run has for them. `run_model`: the
    manifest's, with its adapters; `say` hears what could not be compared.

    Raises:
        UsageError: the models differ; the text says where, and what to do.
    """
    wanted = {name: p for name, p in run_model.named_parameters() if p.requires_grad}
    named = list(script_model.named_parameters())
    found = {common_name(name): p for name, p in named if p.requires_grad}
    advice = _advice(manifest)
    if sum(p.requires_grad for _, p in named) != len(found):
        raise UsageError(
            "the model trains several adapters at once, and the run has one; switch to one of them"
            " with model.set_adapter"
        )
    if missing := [name for name in wanted if name not in found]:
        frozen = {common_name(name) for name, p in named if not p.requires_grad}
        if all(name in frozen for name in missing):
            raise UsageError(
                f"the run trains {_listed(missing)}, which the model keeps frozen; set"
                " requires_grad there"
            )
        raise UsageError(f"the model lacks {_listed(missing)}, which the run trains; {advice}")
    if extra := [name for name in found if name not in wanted]:
        raise UsageError(
            f"the model trains {_listed(extra)}, which the run does not; freeze that"
            f" (requires_grad_(False)), or {advice}"
        )
    for name, parameter in wanted.items():
        mine = found[name]
        if mine.shape != parameter.shape:
            raise UsageError(
                f"{name} is {tuple(mine.shape)} in the model and {tuple(parameter.shape)} in the"
                f" run; {advice}"
            )
        if mine.dtype not in TYPES:
            raise UsageError(
                f"{name} is {mine.dtype}; trainable parameters must be float32, bfloat16 or"
                " float16: cast the model"
            )
        if mine.device.type == "meta":
            raise UsageError(f"{name} is not loaded (device meta); load the model on one device")
    _check_base(run_model, script_model, say)
    _check_scale(run_model, script_model, manifest.method)
    return found


def common_name(name: str) -> str:
    """A parameter's or module's name without what torch.compile and an adapter's name add."""
    return _ADAPTER.sub("default", name.replace("_orig_mod.", ""))


def _check_base(
    run_model: torch.nn.Module, script_model: torch.nn.Module, say: Callable[[str], None]
) -> None:
    """What is frozen must be the run's, as far as the script's type of numbers can tell."""
    wanted = _frozen(run_model)
    found = _frozen(script_model)
    unlike: list[str] = []
    uncompared: list[str] = []
    for name, tensor in wanted.items():
        mine = found.get(name)
        if mine is None or (mine.is_floating_point() and mine.shape != tensor.shape):
            unlike.append(name)
        elif not mine.is_floating_point() and tensor.is_floating_point():
            uncompared.append(name)
        elif not _alike(tensor.detach(), mine.detach().to("cpu")):
            unlike.append(name)
    if unlike:
        raise UsageError(
            f"the model's frozen weights are not the run's: {_listed(unlike)}; load the base that"
            " the run began with (its model.folder, or what `python -m peer export` writes)"
        )
    if uncompared:
        say(
            f"{_listed(uncompared)}: quantised, so it was not compared with the run's base; make"
            " sure that it is the same"
        )


def _alike(wanted: torch.Tensor, mine: torch.Tensor) -> bool:
    """Equal, or so once they are rounded: what was loaded in 16 bits may be held in 32."""
    kinds = (
        {mine.dtype, torch.bfloat16, torch.float16} if mine.is_floating_point() else {mine.dtype}
    )
    return any(torch.equal(wanted.to(kind), mine.to(kind)) for kind in kinds)


def _frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model's state holds beside trainable parameters, by common names."""
    trained = {common_name(name) for name, p in model.named_parameters() if p.requires_grad}
    own = {id(p) for p in model.parameters() if p.requires_grad}
    return {
        common_name(name): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if common_name(name) not in trained and id(tensor) not in own and ".lora_" not in name
    }


def _check_scale(
    run_model: torch.nn.Module, script_model: torch.nn.Module, method: MethodSpec
) -> None:
    found = dict(_scales(script_model))
    for name, scale in _scales(run_model):
        if abs(found.get(name, scale) - scale) > 1e-9 * abs(scale):
            raise UsageError(
                f"{name} scales its adapter by {found[name]:g} and the run by {scale:g}; set"
                f" lora_alpha={method.alpha:g}, r={method.rank} and use_rslora=False"
            )


def _scales(model: torch.nn.Module) -> Iterable[tuple[str, float]]:
    for name, module in model.named_modules():
        scaling: Any = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping) and len(scaling) == 1:
            yield common_name(name), float(next(iter(scaling.values())))


def _advice(manifest: Manifest) -> str:
    method = manifest.method
    if method.kind == "lora":
        targets = list(method.targets) if method.targets else "all-linear"
        return (
            f"give it the run's adapters: LoraConfig(r={method.rank}, lora_alpha={method.alpha:g},"
            f' target_modules={targets!r}, task_type="CAUSAL_LM")'
        )
    return (
        f"make a {manifest.model.config['model_type']} of the run's model.config, without adapters"
        " (`python -m peer export` writes one)"
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED_MAX])
    return shown if len(names) <= NAMED_MAX else f"{shown} and {len(names) - NAMED_MAX} more"
