"""Two threads, one set of parameters: nothing is lost, nothing is counted twice or in between."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from peer.hook.training import NoBlocks, ScriptTrainer
from peer.hook.values import FINISHED_MAX, Finished, ScriptValues
from peer.train.method import StepResult


def _made(dtype: torch.dtype = torch.float32) -> tuple[ScriptValues, torch.nn.Module]:
    run, script = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).to(dtype)
    values = ScriptValues(run, dict(script.named_parameters()), script, lambda: run)
    return values, script


def _held(script: torch.nn.Module, values: ScriptValues) -> np.ndarray[Any, Any]:
    named = dict(script.named_parameters())
    flat = [named[name].detach().float().numpy().ravel() for name in values.layout.names]
    return np.concatenate(flat)


def _step(values: ScriptValues, script: torch.nn.Module, by: float, tokens: int = 10) -> None:
    """What the script does: its optimiser moves every parameter."""
    values.begin_update()
    with torch.no_grad():
        for parameter in script.parameters():
            parameter.add_(by)
    values.end_update(Finished(tokens, 2.0 * tokens, 0.5))


def test_the_script_begins_with_the_runs_values() -> None:
    run = torch.nn.Linear(3, 2)
    script = torch.nn.Linear(3, 2)
    values = ScriptValues(run, dict(script.named_parameters()), script, lambda: run)
    wanted = values.to_numpy()
    assert not np.array_equal(_held(script, values), wanted)
    values.settle()
    np.testing.assert_array_equal(_held(script, values), wanted)
    np.testing.assert_array_equal(_held(run, values), wanted)


def test_what_the_peer_adds_counts_at_once_and_is_written_after_the_next_step() -> None:
    values, script = _made()
    values.settle()
    before = values.to_numpy()
    values.shift(slice(2, 4), np.array([1.0, 2.0], np.float32))
    held = _held(script, values)
    np.testing.assert_array_equal(held, before)
    before[2:4] += np.array([1.0, 2.0], np.float32)
    np.testing.assert_array_equal(values.to_numpy(), before)
    _step(values, script, 0.25)
    np.testing.assert_allclose(_held(script, values), before + 0.25, atol=1e-6)
    np.testing.assert_array_equal(_held(script, values), values.to_numpy())


def test_values_of_one_moment_come_with_the_steps_of_that_moment() -> None:
    values, script = _made()
    values.settle()
    _step(values, script, 0.5, tokens=7)
    with values.still() as made:
        then = values.to_numpy()
        _step(values, script, 0.5, tokens=9)  # the script goes on meanwhile
        assert [step.tokens for step in made] == [7]
        assert values.step(torch.zeros(0)) == StepResult(loss=2.0, tokens=7)
        np.testing.assert_array_equal(values.to_numpy(slice(1, 3)), then[1:3])
        assert not made
    assert values.waiting
    np.testing.assert_allclose(values.to_numpy(), then + 0.5, atol=1e-6)
    assert values.step(torch.zeros(0)).tokens == 9
    assert not values.waiting


def test_nobody_reads_in_the_middle_of_an_update() -> None:
    values, script = _made()
    values.settle()
    values.begin_update()
    seen: list[np.ndarray[Any, Any]] = []
    reader = threading.Thread(target=lambda: seen.append(values.to_numpy()))
    reader.start()
    with torch.no_grad():
        for parameter in script.parameters():
            parameter.fill_(3.0)
    assert not seen
    values.end_update(Finished(1, 1.0, 0.1))
    reader.join()
    assert (seen[0] == 3.0).all()


def test_a_state_that_comes_in_the_middle_of_a_step_ends_it() -> None:
    values, script = _made()
    values.settle()
    _step(values, script, 0.5)
    values.begin_update()
    state = np.arange(values.layout.numel, dtype=np.float32)
    values.load(state)
    with torch.no_grad():
        for parameter in script.parameters():
            parameter.add_(1.0)
    values.end_update(Finished(10, 1.0, 0.1))
    np.testing.assert_array_equal(_held(script, values), state)
    assert not values.waiting, "what was learned on another state is no work for this one"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_additions_too_small_for_16_bits_add_up(dtype: torch.dtype) -> None:
    values, script = _made(dtype)
    values.load(np.ones(values.layout.numel, np.float32))
    values.settle()
    for _ in range(64):
        values.shift(slice(None), np.full(values.layout.numel, 1e-3, np.float32))
        values.settle()
    np.testing.assert_allclose(values.to_numpy(), 1.064, rtol=1e-5)
    np.testing.assert_allclose(_held(script, values), 1.064, rtol=5e-3)


def test_no_rounding_is_sent_as_work() -> None:
    values, _ = _made(torch.bfloat16)
    state = np.random.default_rng(1).standard_normal(values.layout.numel).astype(np.float32)
    values.load(state)
    values.settle()
    np.testing.assert_array_equal(values.to_numpy(), state)


def test_moments_are_dropped_where_the_method_says() -> None:
    values, script = _made()
    values.settle()
    optimizer = torch.optim.AdamW(script.parameters())
    for parameter in script.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    (first,) = (i for i, name in enumerate(values.layout.names) if name == "weight")
    start = values.layout.offsets[first]
    values.forget(slice(start + 2, start + 6))
    values.settle(optimizer)
    weight, bias = script.get_parameter("weight"), script.get_parameter("bias")
    moments = optimizer.state[weight]["exp_avg"].flatten()
    assert (moments[2:] == 0).all()
    assert (moments[:2] != 0).all()
    assert (optimizer.state[bias]["exp_avg"] != 0).all()


def test_steps_that_nobody_asks_for_are_told_as_one() -> None:
    values, script = _made()
    values.settle()
    for _ in range(FINISHED_MAX + 5):
        _step(values, script, 0.0)
    told = [values.step(torch.zeros(0)) for _ in range(FINISHED_MAX)]
    assert not values.waiting
    assert sum(step.tokens for step in told) == 10 * (FINISHED_MAX + 5)
    assert {step.loss for step in told} == {2.0}


def test_another_model_holds_the_outer_values() -> None:
    values, script = _made()
    values.settle()
    held = _held(script, values)
    with values.holding(np.full(values.layout.numel, 5.0, np.float32)) as model:
        assert all((p == 5.0).all() for p in model.parameters())
        assert not model.training
    np.testing.assert_array_equal(_held(script, values), held)
    assert np.isnan(values.evaluate(held, []))


def test_whoever_waits_goes_on_when_the_peer_ends() -> None:
    values, _ = _made()
    values.begin_update()
    reader = threading.Thread(target=values.to_numpy)
    reader.start()
    values.close()
    reader.join()
    values.end_update(Finished(1, 1.0, 0.1))
    assert not values.waiting


async def test_the_training_thread_is_told_of_steps_and_makes_none() -> None:
    from peer.train import build_method
    from peer.train.flat import FlatMethod
    from peer.train.stream import BlockStream
    from tests.train.tiny import manifest

    run = manifest(lr=1.0, momentum=0.0)
    script = torch.nn.Module()

    def build() -> tuple[Any, Any]:
        def local(model: torch.nn.Module) -> ScriptValues:
            for name, p in model.named_parameters():
                script.register_parameter(name.replace(".", "_"), torch.nn.Parameter(p.clone()))
            named = {
                n: script.get_parameter(n.replace(".", "_")) for n, _ in model.named_parameters()
            }
            return ScriptValues(model, named, script, lambda: model)

        method = build_method(run, device="cpu", local=local)
        return method, BlockStream(NoBlocks(), batch_size=1, seed=0, peer="me")

    trainer = ScriptTrainer(build, threads=1)
    await trainer.open()
    assert not trainer.ready.is_set()
    trainer.start()
    assert trainer.ready.is_set()
    values = trainer.values
    values.settle()
    empty = await trainer.harvest(0)
    assert empty.contribution.weight == 0
    _step(values, script, 0.001, tokens=30)
    _step(values, script, 0.001, tokens=50)
    harvest = await trainer.harvest(1)
    assert harvest.contribution.weight == 80
    assert harvest.stats.steps == 2
    assert harvest.stats.trained_s == 1.0
    assert harvest.stats.waited_s == 0.0
    assert harvest.stats.loss == 2.0
    assert list(trainer.frozen) == [(0, 0), (1, 80)]
    method = trainer.method
    assert isinstance(method, FlatMethod)
    delta = np.concatenate(
        [np.frombuffer(b, np.uint8) for b in harvest.contribution.encode(0, method.units)]
    )
    assert len(delta)
    await trainer.aclose()
