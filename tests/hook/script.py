"""A user's finetuning script, as small as one gets: a tiny llama, texts that count up."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dht.memory import MemoryBoard, MemoryDirectory
from peer.config import PeerConfig
from peer.home import Seat
from peer.hook.callback import RunCallback
from peer.manifest import Manifest
from peer.net.budget import UploadBudget
from peer.net.memory import MemoryNetwork
from peer.observe.hub import Hub
from peer.train.models import seeded_model
from protocols.identity import Signer
from tests.peer.swarm import InMemory
from tests.train.tiny import CONFIG


def model(seed: int = 0, config: dict[str, Any] | None = None, **changes: Any) -> torch.nn.Module:
    """Weights of the script's own, which no peer has."""
    torch.manual_seed(seed)
    made: torch.nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**(config or CONFIG), **changes})
    )
    return made


def adapted(run: Manifest) -> torch.nn.Module:
    """The run's base with adapters, as a script makes them: factors of its own."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=run.method.rank,
        lora_alpha=run.method.alpha,
        target_modules=list(run.method.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft still asks transformers 5 the way of transformers 4
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        base = seeded_model(run.model.config, run.model.seed)
        made: torch.nn.Module = get_peft_model(base, config)
    return made


def rows(seed: int, count: int = 64) -> list[dict[str, Any]]:
    """Texts of 16 letters in ASCII's order; the first four of them are only read."""
    rng = random.Random(seed)
    starts = [32 + rng.randrange(78) for _ in range(count)]
    ids = [[start + i for i in range(16)] for start in starts]
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in ids]


def trainer(
    made: torch.nn.Module, folder: Path, *, steps: int = 10**6, seed: int = 0,
    eval_dataset: Any = None, **changes: Any,
) -> Any:  # fmt: skip
    """What the script had before it heard of us."""
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "use_cpu": True,
            "seed": seed,
            "dataloader_pin_memory": False,
            **changes,
        }
    )
    made_trainer = Trainer(
        model=made,
        args=arguments,
        train_dataset=rows(seed),
        eval_dataset=eval_dataset,
        data_collator=collate,
    )
    made_trainer.remove_callback(PrinterCallback)  # stdout is for what the tests read
    return made_trainer


def collate(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in chosen]) for name in chosen[0]}


class Until(TrainerCallback):  # type: ignore[misc]  # transformers has no types for us
    """Ends training as soon as a condition holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        control.should_training_stop |= self._condition()
        return control


async def alone(config: PeerConfig, seat: Seat, signer: Signer, hub: Hub) -> InMemory:
    """A network in which nobody else is."""
    transport = MemoryNetwork(latency_s=0.0).transport(
        signer.peer_id, UploadBudget(config.upload_bps)
    )
    return InMemory(transport, MemoryDirectory(MemoryBoard(), signer.peer_id))


def hook(
    run: Manifest, home: Path, said: list[str], *, files: Mapping[str, Path] | None = None
) -> RunCallback:
    """The line that the script has more, in that network."""
    config = PeerConfig(home=home, manifest=run, files=dict(files or {}))
    return RunCallback(config, 20.0, said.append, alone)
