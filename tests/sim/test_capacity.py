"""Nobody says how fast its line is: peers measure it, and their spans follow."""

from __future__ import annotations

import dataclasses
from statistics import mean

from peer.observe import events as ev
from peer.simulate.nodes import Node
from peer.simulate.planning import plan
from peer.simulate.report import to_text
from peer.simulate.world import World

UNITS = 64
SLOW = 3
RATIO = 8.0


def test_spans_are_as_large_as_the_lines_that_peers_were_seen_to_have() -> None:
    scenario = plan(
        1, peers=4, minutes=8.0, sites=1, round_s=10.0, exchange_s=30.0, parameters=3e6,
        units=UNITS, latency_s=0.005, rate_bps=8e7,
    )  # fmt: skip
    specs = list(scenario.peers)
    specs[SLOW] = dataclasses.replace(specs[SLOW], up_bps=8e7 / RATIO)
    world = World(dataclasses.replace(scenario, peers=tuple(specs), budgets=False))
    told: dict[int, list[int]] = {index: [] for index in range(4)}
    sizes: list[dict[str, int]] = []
    epochs: list[int] = []

    def listen(at_s: float, node: Node, event: ev.Event) -> None:
        if isinstance(event, ev.RoundPlanned) and node.index == 0 and node.group is not None:
            current = node.group.current
            if current is not None and at_s > 240:
                sizes.append({s.aggregator: s.stop - s.start for s in current.plan.spans})
                epochs.append(event.epoch)
        if isinstance(event, ev.RoundPlanned) and node.driver is not None and at_s > 240:
            kbps = node.driver.exchange.upload.kbps
            if kbps is not None:
                told[node.index].append(kbps)

    world.listen(listen)
    record = world.run()
    assert not record.violations, to_text(record)
    fast = [mean(told[index]) for index in range(4) if index != SLOW]
    slow = mean(told[SLOW])
    assert slow == min([slow, *fast])
    assert min(fast) / slow > RATIO / 3, (fast, slow)
    ids = [node.id for node in world.nodes]
    assert len(sizes) > 10
    for spans in sizes[-5:]:
        others = [size for peer, size in spans.items() if peer != ids[SLOW]]
        assert spans[ids[SLOW]] * 2 < mean(others), spans
    assert len(set(epochs)) <= 4, "what is told keeps still, so rosters do"
