"""The finetuning table: its averages are the product's, its bars can fail, all of it can be run."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.finetune.baselines import fedit
from peer.finetune.changes import LowRank
from peer.finetune.coded import decode
from peer.finetune.products import advance, mean_product
from peer.train.hybrid import HybridMethod
from peer.train.lora import LoraMethod
from peer.train.means import Means
from protocols.identity import Signer
from tests.bench import __main__ as program
from tests.bench import (
    finetune,
    finetune_anarchic,
    finetune_arms,
    finetune_exact,
    finetune_kinds,
    finetune_ranks,
    finetune_trial,
    finetune_worker,
    finetune_zeroth,
)
from tests.bench.finetune_arms import Arm, Row
from tests.bench.finetune_base import Base, BaseSize, prepare
from tests.bench.finetune_others import TURNED, HetPeer, close_signed
from tests.bench.finetune_trial import CPU, Outcome, Size, Trial, course_of, manifest_of
from tests.bench.result import Bar, BenchError

CLIENTS = tuple(range(1, 9))
SIZE = Size(tokens=48, batch=1, rounds=2, steps=2, rank=4, targets=("v_proj",), perturbations=2)
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "by", "the", "sea")


def write_data(folder: Path) -> Path:
    """Texts and tasks in the real ones' form."""
    dice = random.Random(1)

    def words(count: int) -> str:
        return " ".join(dice.choices(WORDS, k=count))

    tasks = folder / "natural-instructions"
    tasks.mkdir(parents=True)
    plays = "\n\n".join(f"FIRST:\n{words(12)}" for _ in range(300))
    (folder / "tinyshakespeare.txt").write_text(plays)
    maths = [json.dumps({"question": words(8), "answer": f"{words(3)} #### 4"}) for _ in range(200)]
    (folder / "gsm8k-train.jsonl").write_text("\n".join(maths))
    for client in (*CLIENTS, 99):
        for kind, count in (("client", 20), ("eval", 4)):
            rows = [
                {"instruction": f"Say {client}.", "input": words(3), "output": words(2)}
                for _ in range(count)
            ]
            (tasks / f"{kind}_{client}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    data = write_data(tmp_path_factory.mktemp("data"))
    size = BaseSize(
        vocabulary=300, hidden=16, intermediate=32, layers=1, tokens=48, batch=2, steps=3
    )
    kept = tmp_path_factory.mktemp("kept")
    made = prepare(data, kept, size, lambda _: None, CLIENTS)
    assert prepare(data, kept, size, lambda line: pytest.fail(line), CLIENTS) == made
    return made


def trial(base: Base, way: str = "exact", **size: Any) -> Trial:
    return Trial(
        way=way, base=str(base.folder), seed=3, lr=1e-2, size=replace(SIZE, **size)
    )  # fmt: skip


# ── the base ─────────────────────────────────────────────────────────────────────────────
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--data DIR"):
        prepare(None, tmp_path, BaseSize(), lambda _: None)
    data = write_data(tmp_path / "data")
    (data / "natural-instructions" / "eval_3.json").unlink()
    with pytest.raises(BenchError, match=r"eval_3\.json is missing"):
        prepare(data, tmp_path, BaseSize(), lambda _: None, CLIENTS)


def test_a_measurement_without_data_refuses_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["storm", "--data", "x"])
    assert "storm has no --data" in capsys.readouterr().err
    assert program.main(["finetune", "--quick"]) == 3
    assert "tinyshakespeare.txt" in capsys.readouterr().err


# ── the averages are the product's ───────────────────────────────────────────────────────
def trained(base: Base, aggregate: str) -> list[LoraMethod]:
    """Two peers that have each been somewhere else, with unequal weights."""
    course, one = course_of(str(base.folder), 48), trial(base)
    assert aggregate in ("exact", "fedit")
    peers = [
        finetune_trial.lora_peer(one, course, "exact" if aggregate == "exact" else "fedit")
        for _ in range(2)
    ]
    for client, peer in enumerate(peers):
        stream = course.stream(client, one)
        for _ in range(3 + client):
            peer.step(stream.next_batch())
    return peers


@pytest.mark.parametrize("aggregate", ["exact", "fedit"])
def test_a_round_of_lora_is_the_mean_that_it_is_called(base: Base, aggregate: str) -> None:
    peers = trained(base, aggregate)
    (adapter,) = peers[0]._adapters
    weights = [float(sum(peer._owed._rounds) + peer._owed._fresh) for peer in peers]
    shares = [weight / sum(weights) for weight in weights]
    assert shares[0] != shares[1]
    pairs = [
        (share, adapter.split(peer.inner.to_numpy()))
        for share, peer in zip(shares, peers, strict=True)
    ]
    closed = finetune_trial.close_round(peers)
    A, B = adapter.split(peers[1].state()["factors"])
    if aggregate == "exact":
        (wanted_A, wanted_B), tail = mean_product(pairs)
        wanted = wanted_B @ wanted_A
        assert closed.tail == pytest.approx(tail)
    else:
        mean = fedit([(share, LowRank(*pair)) for share, pair in pairs])
        wanted = mean.B @ mean.A
        exact, _ = mean_product(pairs)
        assert np.abs(wanted - exact[1] @ exact[0]).max() > 1e-6
    np.testing.assert_allclose(B @ A, wanted, atol=1e-7)


def test_a_hybrid_round_is_the_products(base: Base) -> None:
    course, one = course_of(str(base.folder), 48), trial(base, rank=4)
    run = manifest_of(one, course, "hybrid")
    methods = [
        HybridMethod(course.model(), run, CPU, means, seed=7)
        for means in (Means("lora", 4), Means("lora", 2), Means("zo", 2, 2))
    ]
    for client, method in enumerate(methods):
        stream = course.stream(client, one)
        for _ in range(2):
            method.step(stream.next_batch())
    (adapter,), (held,) = methods[0]._adapters, methods[0]._held
    layer = methods[0]._layers[0].layer
    state = LowRank(*adapter.split(held.values.copy()))
    reducer = methods[0].reducer()
    seen: list[tuple[float, bytes]] = []
    reduce = reducer.reduce

    class Watched:
        tails: dict[int, float] | None = None
        check = staticmethod(reducer.check)

        def reduce(self, unit: int, parts: Sequence[tuple[float, bytes]]) -> object:
            seen.extend(parts)
            return reduce(unit, parts)

    methods[0].reducer = Watched  # type: ignore[method-assign,assignment]
    closed = finetune_trial.close_round(methods)
    assert len(seen) == 3
    assert closed.sent_bytes == [len(payload) for _, payload in seen]
    assert closed.sent_bytes[1] < closed.sent_bytes[0]
    changes = []
    for weight, payload in seen:
        change = decode(layer, payload, 4, run.method.admit).change
        changes.append((weight, None, change))
    wanted = advance(state, changes).spectrum(4).project(4, near=state.A).change.dense()
    A, B = adapter.split(methods[2].state()["factors"])
    np.testing.assert_allclose(B @ A, wanted, atol=1e-6)


def test_a_contribution_that_is_refused_ends_the_trial(base: Base) -> None:
    peers = trained(base, "exact")
    peers[1].reducer = lambda: None  # type: ignore[method-assign,assignment,return-value]
    reducer = peers[0].reducer()
    reduce = reducer.reduce

    class Strict:
        check = staticmethod(reducer.check)

        def reduce(self, unit: int, parts: Sequence[tuple[float, bytes]]) -> object:
            return reduce(unit, [parts[0], (parts[1][0], b"broken")])

    peers[0].reducer = Strict  # type: ignore[method-assign,assignment]
    with pytest.raises(BenchError, match="was refused"):
        finetune_trial.close_round(peers)


def test_zeroth_order_peers_send_what_their_run_says_and_hold_one_state(base: Base) -> None:
    outcome = finetune_worker.train(trial(base, "decomfl", steps=4, perturbations=4))
    assert set(outcome.sent_bytes) == {100}
    with pytest.raises(IndexError):
        close_signed([], [Signer(bytes(32))])


def test_a_client_of_hetlora_takes_the_first_ranks_and_keeps_its_moments(base: Base) -> None:
    course, one = course_of(str(base.folder), 48), trial(base)
    peer = HetPeer(one, course, 2)
    (adapted,) = peer.layers.values()
    m, n = adapted.layer.shape
    dice = np.random.default_rng(1)
    state = LowRank(dice.standard_normal((4, n)), dice.standard_normal((m, 4)))
    peer.take([state])
    np.testing.assert_allclose(
        peer.given()[0].dense(), state.B[:, :2] @ state.A[:2], rtol=1e-5, atol=1e-6
    )
    peer.inner.step(course.stream(0, one).next_batch())
    before = peer.inner.state()["exp_avg"].copy()
    assert np.abs(before).max() > 0
    peer.take([LowRank(state.A, state.B)])
    np.testing.assert_array_equal(peer.inner.state()["exp_avg"], before)
    peer.take([LowRank((1 + 2 * TURNED) * state.A, -state.B)])
    assert not peer.inner.state()["exp_avg"].any()


# ── all of it runs ───────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("way", finetune_worker.WAYS)
def test_every_way_trains_and_is_the_same_again(base: Base, way: str) -> None:
    wide = "rank" in way or way in ("three kinds", "hetlora", "exact, whole", "exact, spread")
    size = {"rank": 16} if wide else {}
    one = trial(base, way, **size)
    found = finetune_worker.run(dataclasses.asdict(one))
    outcome = Outcome(**found)
    assert len(outcome.nats) == len(outcome.tokens) == len(CLIENTS)
    assert 0 < outcome.loss() < 20
    assert finetune_worker.train(one).nats == outcome.nats
    untouched = finetune_worker.train(replace(one, way="untrained")).nats
    assert (outcome.nats == untouched) == (way == "untrained")


def test_pooled_data_are_learned_from(base: Base) -> None:
    before = finetune_worker.train(trial(base, "untrained")).loss()
    after = finetune_worker.train(trial(base, "pooled", rounds=3, steps=10)).loss()
    assert after < before - 0.02


def test_the_whole_table_is_made_of_its_parts(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With losses by the name of the way, and no training."""

    def outcome(one: Trial) -> Outcome:
        loss = {"untrained": 5.0, "pooled": 1.0, "fedit": 3.0}.get(one.way, 2.0)
        loss += 0.001 * (one.seed % 1000) + (0.1 if one.lr == 3e-3 else 0.0)
        return Outcome(nats=[loss] * 8, tokens=[1] * 8, sent_bytes=[64] * 8)

    def in_process(trials: Sequence[Trial], kept: object, progress: object) -> dict[Trial, Outcome]:
        return {one: outcome(one) for one in trials}

    monkeypatch.setattr(finetune_arms, "run_all", in_process)
    monkeypatch.setattr(finetune_arms, "FOLDER", tmp_path)
    for part in finetune._PARTS:
        monkeypatch.setattr(part, "base_of", lambda *_: base)
    monkeypatch.setattr(finetune, "base_of", lambda *_: base)
    result = finetune.run(False, 1, lambda _: None)
    assert len({tuple(row) for row in result.rows}) == 1
    assert {row["part"] for row in result.rows} == {part.PART for part in finetune._PARTS}
    assert len(result.bars) == 14
    rates = {row["way"]: row["rate"] for row in result.rows}
    assert rates["exact, cut at the peers' rank"] == "0.001"  # the first of the best


# ── bars can fail ────────────────────────────────────────────────────────────────────────
def rows(**losses: Sequence[float] | tuple[Sequence[float], Sequence[int]]) -> dict[str, Row]:
    """Rows by way (`_` for a space), of losses by seed, the same for every client."""
    found = {}
    for name, told in losses.items():
        way = name.replace("_", " ")
        each, sent = told if isinstance(told, tuple) else (told, ())
        outcomes = [
            Outcome(nats=[loss] * 8, tokens=[1] * 8, sent_bytes=list(sent)) for loss in each
        ]
        found[way] = Row(Arm(way=way, title=way, size=SIZE), 1.0, outcomes)
    return found


def held(bars: Sequence[Bar]) -> list[bool]:
    return [bar.holds for bar in bars]


def test_the_bar_of_exact_averages_compares_gaps() -> None:
    def bar(exact: float, fedit: float) -> list[bool]:
        given = rows(pooled=[1.0, 1.1], exact=[exact, exact], fedit=[fedit, fedit])
        given["exact, whole"] = rows(x=[exact - 0.1, exact - 0.1])["x"]
        given["exact, spread"] = rows(x=[exact - 0.2, exact - 0.2])["x"]
        return held(finetune_exact.bars(given))

    assert bar(1.2, 1.5) == [True, True, True]
    assert bar(1.3, 1.5) == [True, True, False]
    assert bar(1.4, 1.5) == [True, False, False]
    assert bar(1.6, 1.5) == [False, False, False]
    assert bar(1.0, 1.0) == [False, False, False]  # FedIT has no gap that could be halved


def test_the_bars_of_ranks_can_fail() -> None:
    sent = [64 * rank for rank in finetune_worker.RANKS]

    def bars(mixed: float, coded: float, low: float, het: float, wrong: int = 0) -> list[bool]:
        paid = [sent[0] + wrong, *sent[1:]]
        given = rows(mixed_ranks=([mixed, mixed + 0.02], paid), all_rank_2=[low, low + 0.02],
                     hetlora=[het, het + 0.02])  # fmt: skip
        given |= {"mixed ranks, q4": rows(x=[coded, coded + 0.02])["x"]}
        return held(finetune_ranks.bars(given))

    assert bars(2.0, 2.001, 2.1, 2.1) == [True] * 4
    assert bars(2.0, 2.1, 1.9, 1.9, wrong=1000) == [False] * 4


def test_the_bars_of_kinds_look_at_the_weak_peers_tasks() -> None:
    good, bad = rows(three_kinds=[2.0, 2.0], rank_16_alone=[2.1, 2.1]), rows(
        three_kinds=[2.0, 2.0], rank_16_alone=[2.0, 2.0]
    )  # fmt: skip
    assert held(finetune_kinds.bars(good)) == [True, True]
    assert held(finetune_kinds.bars(bad)) == [False, False]


def test_the_bars_of_zeroth_order_can_fail() -> None:
    def bars(fed: float, pooled: float, sent: int) -> list[bool]:
        rival = rows(x=[pooled, pooled])["x"]
        given = rows(untrained=[5.0, 5.0], decomfl=([fed, fed], [sent]), kseed=([fed, fed], [sent]))
        return held(
            finetune_zeroth.bars(given | {"pooled mezo": rival, "pooled mezo, P = 1": rival})
        )  # fmt: skip

    assert bars(4.0, 4.0, 100) == [True] * 4
    assert bars(4.2, 4.0, 20_000) == [False] * 4
    assert bars(4.9, 5.1, 100) == [False, True, False, True]


def test_the_anarchic_bar_looks_at_the_rare_peers() -> None:
    def bar(cs: float, cd: float) -> list[bool]:
        given = {"afa-cs": rows(x=[cs, cs])["x"], "afa-cd": rows(x=[cd, cd])["x"]}
        return held(finetune_anarchic.bars(given))

    assert bar(1.9, 2.0) == [True]
    assert bar(2.0, 2.0) == [False]
