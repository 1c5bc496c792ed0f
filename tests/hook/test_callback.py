"""A Trainer's own loop with a peer beside it: what is counted, what comes back, how it ends."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peer.errors import UsageError
from peer.hook import join_run
from peer.hook.callback import RunCallback, check_arguments
from peer.manifest import Asset, InnerSpec, Manifest
from peer.manifest_evaluation import EvaluationSpec
from peer.observe import events as ev
from peer.train import build_method
from tests.hook.script import Until, adapted, collate, hook, model, rows, trainer
from tests.peer.swarm import toy_manifest
from tests.train.chat_tiny import lines
from tests.train.tiny import manifest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*")


def _run(kind: str = "pretrain", round_s: float = 0.3, **changes: Any) -> Manifest:
    """A run whose outer step takes the mean as it is: alone, a peer keeps what it learned."""
    run = manifest(kind, **{"lr": 1.0, "momentum": 0.0, **changes})
    schedule = dataclasses.replace(
        toy_manifest(round_s).schedule, gossip_every=run.schedule.gossip_every
    )
    return dataclasses.replace(run, schedule=schedule)


class Watch(Until):
    """Notes the peer's events, and ends after so many rounds."""

    def __init__(self, callback: RunCallback, rounds: int) -> None:
        super().__init__(lambda: len(self.all(ev.RoundFinished)) >= rounds)
        self._callback = callback
        self.events: list[ev.Event] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        assert self._callback.peer is not None
        self._callback.peer.hub.listen(self.events.append)

    def all(self, kind: type[Any]) -> list[Any]:
        return [event for event in list(self.events) if isinstance(event, kind)]


def _values(made: torch.nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    return {name: p.detach().float().numpy().copy() for name, p in made.named_parameters()}


def _untrained_loss(run: Manifest) -> float:
    fresh = build_method(run, device="cpu", threads=1)
    with fresh.outer_model() as untrained, torch.no_grad():
        batch = collate(rows(0))
        return float(untrained(**batch).loss)


def _train(
    run: Manifest, folder: Path, rounds: int = 3, **changes: Any
) -> tuple[Any, RunCallback, Watch, list[str]]:
    said: list[str] = []
    callback = hook(run, folder / "home", said)
    watch = Watch(callback, rounds)
    it = trainer(changes.pop("made", None) or model(1), folder / "out", **changes)
    it.add_callback(callback)
    it.add_callback(watch)
    it.train()
    return it, callback, watch, said


def test_a_script_learns_with_the_run_and_ends_with_the_runs_model(tmp_path: Path) -> None:
    run = _run()
    before = _untrained_loss(run)
    it, callback, watch, said = _train(run, tmp_path)
    assert callback.peer is None
    assert not any("lost" in line for line in said)
    sent = watch.all(ev.ContributionSent)
    steps = it.state.global_step
    assert sum(event.steps for event in sent) == steps
    assert sum(event.weight for event in sent) == steps * 4 * 12  # of 16 tokens 12 are learned
    finished = watch.all(ev.RoundFinished)
    assert all(event.validation_loss is None for event in finished)
    assert finished[-1].waited_s == 0
    assert it.evaluate(it.train_dataset)["eval_loss"] < 0.8 * before


def test_what_the_script_ends_with_is_what_the_peer_saved(tmp_path: Path) -> None:
    from peer.checkpoint import CheckpointStore
    from peer.home import seats
    from peer.train.flat import FlatMethod

    run = _run(lr=0.7, momentum=0.9)
    it, _, _, _ = _train(run, tmp_path)
    (seat,) = seats(tmp_path / "home")
    saved = CheckpointStore(
        seat.folder / "runs" / run.run_id() / "checkpoints", read_only=True
    ).load()
    assert saved is not None
    fresh = build_method(run, device="cpu", threads=1)
    assert isinstance(fresh, FlatMethod)
    fresh.load_state(saved.arrays)
    for entry in saved.journal:
        fresh.apply(entry.units, np.zeros(len(entry.units), np.bool_))
    with fresh.outer_model() as wanted:
        mine = _values(it.model)
        for name, values in _values(wanted).items():
            np.testing.assert_array_equal(values, mine[name], err_msg=name)


def test_a_script_scores_the_runs_questions_with_another_copy_of_the_model(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    lines(file, [{"question": f"{n}?", "answer": "six"} for n in range(5)])
    content = file.read_bytes()
    name, digest = "data/questions-000", hashlib.sha256(content).hexdigest()
    run = _run()
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, sequence_length=48),
        schedule=dataclasses.replace(run.schedule, evaluate_every=2),
        assets=(Asset(name=name, sha256=digest, bytes=len(content)),),
        evaluation=EvaluationSpec(rows=8, paths=(name,)),
    )
    said: list[str] = []
    callback = hook(run, tmp_path / "home", said, files={name: file})
    watch = Watch(callback, 4)
    it = trainer(model(1), tmp_path / "out")
    it.add_callback(callback)
    it.add_callback(watch)
    it.train()
    (told, *_) = watch.all(ev.ScoredTogether)
    assert told.sums["rows"] == 5
    assert any("5 questions, perplexity" in line for line in said)


def test_accumulated_batches_and_evaluations_are_counted_right(tmp_path: Path) -> None:
    it, _, watch, _ = _train(
        _run(),
        tmp_path,
        gradient_accumulation_steps=3,
        eval_strategy="steps",
        eval_steps=5,
        eval_dataset=rows(7),
    )
    sent = watch.all(ev.ContributionSent)
    # 64 rows make 16 batches: five steps of three, and one of the batch that is left.
    epochs, more = divmod(it.state.global_step, 6)
    batches = epochs * 16 + 3 * more
    assert sum(event.weight for event in sent) == batches * 4 * 12
    assert sum(event.steps for event in sent) == it.state.global_step
    losses = [event.loss for event in watch.all(ev.RoundFinished)]
    assert all(0 < loss < 6 for loss in losses)
    assert losses[-1] < losses[0]


def test_what_rounds_add_to_bfloat16_is_not_lost_to_rounding(tmp_path: Path) -> None:
    made = model(1).to(torch.bfloat16)
    it, callback, watch, _ = _train(_run(), tmp_path, made=made)
    assert {p.dtype for p in it.model.parameters()} == {torch.bfloat16}
    assert watch.all(ev.RoundFinished)[-1].included == 1.0
    assert callback.peer is None


def test_a_lora_script_keeps_its_base_and_learns(tmp_path: Path) -> None:
    run = _run("lora")
    made = adapted(run)
    base = {name: values for name, values in _values(made).items() if ".lora_" not in name}
    it, _, _, _ = _train(run, tmp_path, made=made)
    now = _values(it.model)
    for name, values in base.items():
        np.testing.assert_array_equal(values, now[name], err_msg=name)
    assert it.evaluate(it.train_dataset)["eval_loss"] < 0.95 * _untrained_loss(run)


def test_a_script_that_resumes_goes_on_from_the_runs_state(tmp_path: Path) -> None:
    run = _run()
    _, _, first, _ = _train(run, tmp_path, save_strategy="steps", save_steps=4)
    left_at = first.all(ev.RoundFinished)[-1].round
    said: list[str] = []
    callback = hook(run, tmp_path / "home", said)
    watch = Watch(callback, 2)
    again = trainer(model(2), tmp_path / "out", save_strategy="no")
    again.add_callback(callback)
    again.add_callback(watch)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{_last(tmp_path)}"))
    assert watch.all(ev.RoundFinished)[0].round > left_at
    assert watch.all(ev.RoundFinished)[0].loss < first.all(ev.RoundFinished)[0].loss
    assert any("resumed at round" in line for line in said)


def _last(folder: Path) -> int:
    return max(int(p.name.partition("-")[2]) for p in (folder / "out").glob("checkpoint-*"))


def test_training_again_after_an_error_sends_nothing_that_was_not_trained(tmp_path: Path) -> None:
    run, said = _run(), list[str]()
    callback = hook(run, tmp_path / "home", said)
    watch = Watch(callback, 3)
    it = trainer(model(1), tmp_path / "out")
    it.add_callback(callback)
    it.add_callback(watch)

    class Stop(Until):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 5:
                raise OSError("the script's own trouble, in the middle of an update")

    stop = Stop(lambda: False)
    it.add_callback(stop)
    with pytest.raises(OSError, match="own trouble"):
        it.train()
    assert callback.peer is not None, "the script may call train() again"
    it.remove_callback(stop)
    with torch.no_grad():
        for parameter in it.model.parameters():
            parameter.add_(1.0)  # what somebody did meanwhile is no work
    it.train()
    assert it.evaluate(it.train_dataset)["eval_loss"] < _untrained_loss(run)
    assert callback.peer is None


def test_workers_that_load_data_leave_the_peer_alone(tmp_path: Path) -> None:
    _, callback, watch, said = _train(_run(), tmp_path, dataloader_num_workers=2)
    assert watch.all(ev.RoundFinished)[-1].included == 1.0
    assert sum("left: " in line for line in said) == 1
    assert callback.peer is None


def test_a_script_that_runs_away_goes_back_to_what_the_run_has(tmp_path: Path) -> None:
    run, said = _run(), list[str]()
    callback = hook(run, tmp_path / "home", said)
    watch = Watch(callback, 5)

    class Poison(Until):
        """A gradient that is not finite reaches the parameters and the optimiser's moments."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 5:
                for parameter in more["model"].parameters():
                    parameter.grad.fill_(torch.nan)

    it = trainer(model(1), tmp_path / "out", max_grad_norm=0.0)
    it.add_callback(callback)
    it.add_callback(watch)
    it.add_callback(Poison(lambda: False))
    it.train()
    assert it.evaluate(it.train_dataset)["eval_loss"] < _untrained_loss(run)
    assert math.isfinite(watch.all(ev.RoundFinished)[-1].loss)
    sent = watch.all(ev.ContributionSent)
    assert sum(event.weight for event in sent) < it.state.global_step * 4 * 12


def test_a_step_that_a_gradient_scaler_skipped_weighs_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    callback = hook(_run(), tmp_path / "home", said)
    watch = Watch(callback, 2)
    skipped: list[int] = []

    class Skip(Until):
        """Every second step is refused, as a scaler does where gradients overflow."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            refused = state.global_step % 2 == 1
            it.optimizer._is_overflow = refused
            skipped.append(int(refused))

    it = trainer(model(1), tmp_path / "out")
    it.add_callback(Skip(lambda: False))
    it.add_callback(callback)
    it.add_callback(watch)
    it.train()
    sent = watch.all(ev.ContributionSent)
    assert sum(event.weight for event in sent) == (len(skipped) - sum(skipped)) * 4 * 12


def test_a_model_that_is_not_the_runs_is_refused_before_training(tmp_path: Path) -> None:
    said: list[str] = []
    it = trainer(model(1, hidden_size=16, intermediate_size=32), tmp_path / "out")
    it.add_callback(hook(_run(), tmp_path / "home", said))
    with pytest.raises(UsageError, match=r"\(260, 16\) in the model and \(260, 32\) in the run"):
        it.train()
    assert it.state.global_step == 0


def test_a_run_whose_learning_has_ended_stops_the_script(tmp_path: Path) -> None:
    run = dataclasses.replace(_run(), inner=InnerSpec(ends="2020-01-01T00:00:00Z"))
    it, _, _, said = _train(run, tmp_path, rounds=10**6)
    assert it.state.global_step == 1
    assert any("learning ended at 2020-01-01" in line for line in said)


def test_training_goes_on_alone_when_the_peer_breaks_down(tmp_path: Path) -> None:
    said: list[str] = []
    callback = hook(_run(), tmp_path / "home", said)

    class Break(Until):
        broken = False

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
            beside = callback._beside
            assert beside is not None
            if not self.broken:
                self.broken = True

                def fail(event: ev.Event) -> None:
                    raise AssertionError

                method: Any = beside.trainer.method
                method.contribution = fail
                self.step = 0
            if beside.over:
                self.step += 1
            control.should_training_stop |= beside.over and self.step > 3
            return control

    it = trainer(model(1), tmp_path / "out")
    it.add_callback(callback)
    it.add_callback(Break(lambda: False))
    it.train()
    assert sum("training goes on alone" in line for line in said) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"world_size": 2}, "one process"),
        ({"n_gpu": 2}, "one device"),
        ({"deepspeed": "ds.json"}, "deepspeed"),
        ({"fsdp": ["full_shard"]}, "fsdp"),
    ],
)
def test_a_model_shared_out_among_devices_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_arguments(SimpleNamespace(**{"world_size": 1, "n_gpu": 1, **changes}))


def test_options_that_make_no_sense_are_named() -> None:
    with pytest.raises(UsageError, match="no option 'vai'"):
        join_run(vai="/ip4/127.0.0.1/tcp/1")
    with pytest.raises(UsageError, match="no such file"):
        join_run("nowhere.toml")
    with pytest.raises(UsageError, match="--site"):
        join_run(site="not a label")
