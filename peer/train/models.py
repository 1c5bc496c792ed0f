"""Causal language models from a manifest: built, filled, counted and bounded.

Only transformers' own architectures (`manifest.MODEL_TYPES`), only safetensors, never remote code.
transformers is imported late: it takes two seconds, and a peer has other things to start.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peer.errors import ManifestError, StorageError
from peer.manifest import Manifest
from peer.train.base import check_base

PARAMETERS_MAX: Final = 200 * 10**9  # beyond any machine a volunteer has; refused before building
BYTES_PER_PARAMETER: Final = 28  # weights, gradient, two moments; outer weights, momentum, update
BYTES_PER_FORWARD: Final = 8  # zo: the weights, and a copy while their digest is made
BYTES_PER_FROZEN: Final = 4  # lora, hybrid, zo: float32 weights that are only read

_FILL_VALUES: Final = 2**22  # drawn at a time: 32 MiB of float64


def build_model(manifest: Manifest, assets: Path | None) -> torch.nn.Module:
    """The manifest's model in float32 on the CPU, the same values on every machine.

    Weights come from the assets `model/*.safetensors` below `assets`, or else from the seed.

    Raises:
        ManifestError: the config makes no model, a model too large for this machine, or one that
            the weights don't fit.
        StorageError: an asset is missing.
    """
    count = parameters_of(manifest.model.config)
    each = BYTES_PER_PARAMETER if manifest.method.kind == "pretrain" else BYTES_PER_FROZEN
    if manifest.method.kind == "zo" and not manifest.zeroth.adapters:
        each = BYTES_PER_FORWARD
    _require_memory(count * each)
    names = manifest.asset_names("model")
    if names:
        model = _load(manifest.model.config, [require_asset(assets, name) for name in names])
    else:
        model = seeded_model(manifest.model.config, manifest.model.seed)
    with torch.no_grad(), _blame_config():  # heads and sizes that don't agree show only here
        model.eval()(input_ids=torch.zeros(1, 8, dtype=torch.int64))
    return model


def seeded_model(config: Mapping[str, Any], seed: int) -> torch.nn.Module:
    """A model with first weights that depend on nothing but `config` and `seed`.

    torch's own generators give other last bits on other CPUs, and the order of draws is the
    library's business. So we only learn *what* each tensor should be drawn from, and draw it
    ourselves from NumPy's frozen MT19937, keyed by the tensor's name.
    """
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]), recorder:
        torch.manual_seed(seed)  # for the rare draw that is neither normal nor uniform
        model = _from_config(config)
    for name, tensor in model.named_parameters():
        draw = recorder.draws.get(tensor.untyped_storage().data_ptr())
        if draw is not None:
            _fill(tensor.data, draw, seed, name)
    return model


def parameters_of(config: Mapping[str, Any]) -> int:
    """How many parameters a config makes, tied ones once, without allocating them.

    Raises:
        ManifestError: it makes none, or more than `PARAMETERS_MAX`.
    """
    with torch.device("meta"):
        count = count_parameters(_from_config(config))
    if count > PARAMETERS_MAX:
        raise ManifestError(
            f"model.config: makes {count / 1e9:,.0f} billion parameters, at most "
            f"{PARAMETERS_MAX / 1e9:,.0f} are allowed; choose a smaller model"
        )
    return count


def count_parameters(model: torch.nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def load_folder(folder: Path) -> torch.nn.Module:
    """A model that `export` (or anybody's save_pretrained) wrote, in float32 on the CPU.

    Raises:
        StorageError: there is no such model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_library():
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False,
                dtype=torch.float32,
            )  # fmt: skip
        return cast("torch.nn.Module", model)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{folder}: no model there ({error}); name an exported folder"
        ) from error


def load_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """`model` with the adapter that peft wrote to `folder` (safetensors only), merged into it.

    Raises:
        StorageError: there is no such adapter, or it is another model's.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise StorageError(f"{folder}: no {name} there; name a folder that peft wrote")
    check_base(folder, model)
    try:
        with quiet_library(), warnings.catch_warnings():
            # peft still asks transformers 5 the way of transformers 4.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            warnings.filterwarnings("ignore", message=".*adapter keys")  # we look ourselves
            adapted = PeftModel.from_pretrained(cast("Any", model), str(folder))
            with safe_open(folder / "adapter_model.safetensors", "pt") as file:
                odd = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
            if odd:
                raise ValueError(f"{min(odd)} is in one of the two only")
            return cast("torch.nn.Module", adapted.merge_and_unload())
    except (
        OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError,
    ) as error:  # fmt: skip
        text = " ".join(str(error).split())[:200]
        raise StorageError(
            f"{folder}: is no adapter of this model ({text}); name the model that it was made for"
        ) from error


@contextmanager
def quiet_library() -> Iterator[None]:
    """transformers without progress bars and reports: the terminal belongs to the live view."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def require_asset(assets: Path | None, name: str) -> Path:
    """Where an asset lies.

    Raises:
        StorageError: it is not there.
    """
    path = None if assets is None else assets / name
    if path is None or not path.is_file():
        raise StorageError(
            f"the run's file {name} is not here ({path}); join again so that it is fetched"
        )
    return path


def generator_of(seed: int, name: str) -> np.random.RandomState:
    """A generator for one named tensor: NumPy's legacy stream, which is frozen for good."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


def _from_config(config: Mapping[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with _blame_config():
        made = AutoConfig.for_model(**config, use_cache=False)
        model = AutoModelForCausalLM.from_config(made, trust_remote_code=False, dtype=torch.float32)
    return cast("torch.nn.Module", model)


def _load(config: Mapping[str, Any], files: Sequence[Path]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with _blame_config():
        made = AutoConfig.for_model(**config, use_cache=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            files[0].parent, config=made, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True, generation_config=GenerationConfig.from_model_config(made),
        )  # fmt: skip
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise ManifestError(
            f"model: the weights lack {missing[0]} ({len(missing)} in all); check that config.json "
            "and the safetensors files belong together"
        )
    return cast("torch.nn.Module", model)


@contextmanager
def _blame_config() -> Iterator[None]:
    """Whatever the library's validators, constructors and readers raise, the manifest is wrong."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        with quiet_library():
            yield
    except (
        StrictDataclassError, SafetensorError, ValueError, TypeError, LookupError, AttributeError,
        AssertionError, ArithmeticError, RuntimeError, OSError,
    ) as error:  # fmt: skip
        text = " ".join(str(error).split())[:300]
        raise ManifestError(f"model.config: makes no working model ({text}); correct it") from error


def _require_memory(need: int) -> None:
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ManifestError(
            f"model: needs about {need / 2**30:,.0f} GiB of memory and this machine has "
            f"{have / 2**30:,.0f}; join a smaller run or a lora run"
        )


_Draw = tuple[str, float, float]
"""("normal", mean, deviation) or ("uniform", low, high)."""


_OVERWRITES: Final = (
    torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor,
    torch.ops.aten.copy_.default,
)  # fmt: skip


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the last random draw into each storage instead of making it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: dict[int, _Draw] = {}
        self._kept: list[torch.UntypedStorage] = []  # or a freed one's address would come again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind = {
            torch.ops.aten.normal_.default: "normal",
            torch.ops.aten.uniform_.default: "uniform",
        }.get(func)
        if kind is not None:
            first = float(args[1]) if len(args) > 1 else 0.0
            second = float(args[2]) if len(args) > 2 else 1.0
            storage = args[0].untyped_storage()
            self.draws[storage.data_ptr()] = (kind, first, second)
            self._kept.append(storage)
            return args[0]
        if func in _OVERWRITES and args[0].numel() * args[0].element_size() == (
            args[0].untyped_storage().nbytes()
        ):
            self.draws.pop(args[0].untyped_storage().data_ptr(), None)
        return func(*args, **(kwargs or {}))


def _fill(tensor: torch.Tensor, draw: _Draw, seed: int, name: str) -> None:
    kind, first, second = draw
    generator = generator_of(seed, name)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _FILL_VALUES):
        piece = flat[start : start + _FILL_VALUES]
        if kind == "normal":
            values = generator.standard_normal(piece.numel()) * second + first
        else:
            values = generator.random_sample(piece.numel()) * (second - first) + first
        piece.copy_(torch.from_numpy(values.astype(np.float32)))
