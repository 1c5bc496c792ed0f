"""What does not fit the run is refused by its name, with what to do."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from peer.errors import UsageError
from peer.hook.fit import check_kind, fitting_parameters
from peer.manifest import Manifest, MethodSpec
from peer.train.lora import with_adapters
from peer.train.models import build_model
from tests.hook.script import adapted, model
from tests.train.hybrid_tiny import hybrid_manifest
from tests.train.tiny import manifest


def _run_model(run: Manifest) -> torch.nn.Module:
    made = build_model(run, None)
    return with_adapters(made, run.method, 0) if run.method.kind == "lora" else made


def _fit(run: Manifest, script: torch.nn.Module) -> tuple[dict[str, torch.nn.Parameter], list[str]]:
    said: list[str] = []
    return fitting_parameters(run, _run_model(run), script, said.append), said


def _refused(run: Manifest, script: torch.nn.Module, *says: str) -> None:
    with pytest.raises(UsageError) as error:
        _fit(run, script)
    for text in says:
        assert re.search(re.escape(text), str(error.value)), str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_runs_own_kind_of_model_fits(dtype: torch.dtype) -> None:
    run = manifest()
    script = model(3).to(dtype)
    found, said = _fit(run, script)
    assert not said
    assert found == dict(script.named_parameters())
    lora = manifest("lora")
    found, said = _fit(lora, adapted(lora).to(dtype))
    assert not said
    assert all(".lora_" in name for name in found)


def test_an_adapter_may_have_any_name() -> None:
    run = manifest("lora")
    script = adapted(run)
    script.add_adapter("mine", script.peft_config["default"])  # type: ignore[operator,index]
    script.set_adapter("mine")  # type: ignore[operator]
    found, _ = _fit(run, script)
    names = {name for name, p in script.named_parameters() if p.requires_grad}
    assert all(".mine." in name for name in names)
    assert len(found) == len(names)


def test_another_shape_is_named_with_both() -> None:
    _refused(
        manifest(), model(1, hidden_size=16, intermediate_size=32), "(260, 16)", "(260, 32)",
        "peer export",
    )  # fmt: skip


def test_a_model_without_adapters_is_told_which_the_run_has() -> None:
    run = manifest("lora")
    plain = build_model(run, None)
    plain.requires_grad_(False)
    _refused(run, plain, "lora_A", "LoraConfig(r=4", "lora_alpha=16", "all-linear")


def test_an_adapted_model_is_no_pretraining_peer() -> None:
    run = manifest("lora")
    _refused(manifest(), adapted(run), "without adapters")


def test_another_rank_is_refused() -> None:
    run = manifest("lora")
    other = dataclasses.replace(run, method=dataclasses.replace(run.method, rank=2))
    _refused(run, adapted(other), "lora_A", "(2, 32)", "(4, 32)", "r=4")


def test_frozen_parameters_that_the_run_trains_are_named() -> None:
    script = model(1)
    script.get_parameter("model.norm.weight").requires_grad_(False)
    _refused(manifest(), script, "model.norm.weight", "keeps frozen", "requires_grad")


def test_what_the_run_does_not_train_is_named() -> None:
    run = manifest("lora")
    script = adapted(run)
    name = "base_model.model.model.norm.weight"
    script.get_parameter(name).requires_grad_(True)
    _refused(run, script, name, "freeze that")


def test_an_untied_head_is_another_model() -> None:
    _refused(manifest(), model(1, tie_word_embeddings=False), "lm_head.weight")


def test_another_base_is_refused_by_the_tensor() -> None:
    run = manifest("lora")
    script = adapted(run)
    name = "base_model.model.model.layers.1.mlp.up_proj.base_layer.weight"
    with torch.no_grad():
        script.get_parameter(name)[0, 0] += 1.0
    _refused(run, script, name, "load the base")


def test_another_scale_is_refused() -> None:
    run = manifest("lora")
    other = dataclasses.replace(run, method=MethodSpec(kind="lora", rank=4, alpha=1.0))
    _refused(run, adapted(other), "scales its adapter by 0.25 and the run by 4", "lora_alpha=16")


def test_a_quantised_base_is_let_in_and_said_to_be_unknown() -> None:
    run = manifest("lora")
    script = adapted(run)
    layer = script.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    layer.weight = torch.nn.Parameter(torch.zeros(10, dtype=torch.uint8), requires_grad=False)
    _, said = _fit(run, script)
    assert len(said) == 1
    assert "up_proj" in said[0]
    assert "quantised" in said[0]


def test_numbers_of_64_bits_and_models_that_are_not_loaded_are_refused() -> None:
    _refused(manifest(), model(1).double(), "float64", "cast the model")
    with torch.device("meta"):
        nothing = model(1)
    _refused(manifest(), nothing, "not loaded")


def test_runs_in_which_no_script_makes_the_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="hybrid run"):
        check_kind(hybrid_manifest())
    check_kind(manifest("lora"))
