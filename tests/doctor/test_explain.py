"""Every ailment is named in a sentence, with a next step, a level and an exit code."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from peer.doctor import report
from peer.doctor.conclude import conclude
from peer.doctor.explain import exit_code
from peer.doctor.facts import Answered, Facts, Flow, ViaFacts
from peer.doctor.findings import Level
from peer.doctor.messages import Dialled, Place
from tests.doctor.patients import (
    HEALTHY,
    HOSTS,
    MACHINE,
    PORT,
    PUBLIC,
    RUN,
    address,
    behind,
    everyone,
    finding,
    findings,
    port,
    witness,
)
from tests.pages import ROOT

ONE, OTHER = Place(PUBLIC, 40001), Place(PUBLIC, 40002)


def via(answered: Answered, web_port: bool | None = None) -> ViaFacts:
    return ViaFacts(address=address(HOSTS[0]), answered=answered, web_port=web_port)


def alone(*vias: ViaFacts) -> Facts:
    """Nobody answers."""
    return replace(HEALTHY, vias=vias, peers=(), dht_nodes=0)


RUNNING = port(free=False, ours=True)
SICK: dict[str, tuple[Facts, str, Level, int, str]] = {
    # name: (facts, topic, level, exit code, words in the sentence)
    "no network": (replace(alone(), hosts=()), "network", Level.ERROR, 5, "loopback"),
    "no daemon": (
        replace(alone(), network_error="p2pd can't run"), "daemon", Level.ERROR, 5, "p2pd",
    ),
    "no such host": (
        replace(HEALTHY, libp2p=port(free=False, error="no address of ours")),
        "port", Level.ERROR, 5, "no address",
    ),
    "the port is taken": (
        replace(HEALTHY, libp2p=port(given=True, free=False)), "port", Level.ERROR, 5, "taken",
    ),
    "the old port is taken": (
        replace(HEALTHY, libp2p=port(free=False)), "port", Level.WARNING, 0, "taken",
    ),
    "the lane's port is taken": (
        replace(HEALTHY, lane=port(4444, given=True, free=False)),
        "lane-port", Level.ERROR, 5, "4444",
    ),
    "no address is known": (alone(), "bootstrap", Level.ERROR, 5, "measured"),
    "none answers": (alone(via(Answered.SILENT)), "bootstrap", Level.ERROR, 5, "none of 1"),
    "silence": (alone(via(Answered.SILENT)), "via", Level.ERROR, 5, "no packet comes back"),
    "only web ports": (
        alone(via(Answered.SILENT, web_port=True)), "via", Level.ERROR, 5, "only to web ports",
    ),
    "nobody listens": (alone(via(Answered.REFUSED)), "via", Level.ERROR, 5, "nothing listens"),
    "somebody else": (alone(via(Answered.OTHER)), "via", Level.ERROR, 5, "not that peer"),
    "no way": (alone(via(Answered.NO_WAY)), "via", Level.ERROR, 5, "no way"),
    "one of two is cut off": (
        replace(HEALTHY, vias=(*HEALTHY.vias[:1], via(Answered.SILENT))),
        "via", Level.WARNING, 0, "others answer",
    ),
    "old peers": (everyone(probes=False), "probes", Level.NOTE, 0, "no probes"),
    "a wrong clock": (everyone(skew_s=95.0), "clock", Level.ERROR, 5, "95.0 s behind"),
    "a fast clock": (everyone(skew_s=-8.0), "clock", Level.WARNING, 0, "8.0 s ahead"),
    "a router without forwarding": (behind(ONE, ONE), "reach", Level.WARNING, 0, "router"),
    "a firewall": (
        everyone(dialled={PORT: Dialled.SILENT}), "reach", Level.WARNING, 0, "firewall",
    ),
    "through a relay": (
        behind(ONE, ONE, addresses=(f"{address(HOSTS[2])}/p2p-circuit/p2p/12D3KooWme",)),
        "reach", Level.WARNING, 0, HOSTS[2],
    ),
    "only neighbours": (everyone(outside=False), "reach", Level.NOTE, 0, "not known"),
    "the lane is shut": (
        replace(everyone(dialled={PORT: Dialled.LIBP2P, 4444: Dialled.SILENT}), lane=port(4444)),
        "lane-reach", Level.NOTE, 0, "4444",
    ),
    "a cone": (behind(ONE, ONE), "nat", Level.NOTE, 0, "a cone"),
    "a symmetric NAT": (behind(ONE, OTHER), "nat", Level.WARNING, 0, "symmetric NAT"),
    "the provider's NAT": (
        replace(behind(ONE, OTHER), hosts=("100.64.3.2",)), "nat", Level.WARNING, 0, "provider's",
    ),
    "one witness": (behind(ONE), "nat", Level.NOTE, 0, "one observer"),
    "no witness": (everyone(outside=False), "nat", Level.NOTE, 0, "not known"),
    "no DHT": (
        replace(everyone(dht_nodes=0), dht_nodes=0), "dht", Level.WARNING, 0, "none is a node",
    ),
    "no bytes to spare": (
        everyone(up_bps=None, down_bps=None), "bandwidth", Level.NOTE, 0, "No peer had bytes",
    ),
    "a thin line": (everyone(up_bps=4e5), "bandwidth", Level.WARNING, 0, "400 kbit/s"),
    "a long queue": (everyone(rtt_busy_s=0.9), "queue", Level.WARNING, 0, "900 ms"),
    "a budget above the line": (
        replace(HEALTHY, upload_bps=100e6), "queue", Level.WARNING, 0, "promises 100 Mbit/s",
    ),
    "a peer trains meanwhile": (
        replace(HEALTHY, running=True, libp2p=RUNNING), "running", Level.NOTE, 0, "shares",
    ),
    "far away": (everyone(rtt_s=0.6, rtt_busy_s=0.6), "rtt", Level.WARNING, 0, "600 ms"),
    "no kernel to ask": (everyone(up=None, down=None), "loss", Level.NOTE, 0, "not be measured"),
    "loss": (everyone(up=Flow(segments=500, repeated=15)), "loss", Level.WARNING, 0, "3.0 % up"),
    "much loss": (
        everyone(down=Flow(segments=500, repeated=50)), "loss", Level.WARNING, 0, "10.0 % down",
    ),
    "small packets": (everyone(mtu=1200), "mtu", Level.WARNING, 0, "1200 bytes"),
    "large packets vanish": (everyone(large_stuck=True), "mtu-hole", Level.ERROR, 5, "larger ones"),
    "no right to write": (
        replace(HEALTHY, machine=replace(MACHINE, writable=False)),
        "disk", Level.ERROR, 7, "can't be written",
    ),
    "a full disk": (
        replace(HEALTHY, machine=replace(MACHINE, disk_free=10**6)),
        "disk", Level.ERROR, 7, "1 MB are free",
    ),
    "a disk nearly full": (
        replace(HEALTHY, machine=replace(MACHINE, disk_free=9 * 10**8)),
        "disk", Level.WARNING, 0, "900 MB are free",
    ),
    "too little memory": (
        replace(HEALTHY, run=replace(RUN, parameters=10**9)), "memory", Level.WARNING, 0, "28 GB",
    ),
    "a member": (behind(ONE, ONE), "role", Level.NOTE, 0, "member"),
    "another codec": (
        replace(everyone(up_bps=1e6), run=RUN), "codec", Level.WARNING, 0, "fits",
    ),
    "no codec": (
        replace(everyone(up_bps=1e5), run=replace(RUN, parameters=10**9)),
        "codec", Level.WARNING, 0, "No codec",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SICK)
def test_an_ailment_is_named_with_a_next_step(name: str) -> None:
    facts, topic, level, code, words = SICK[name]
    found = finding(facts, topic)
    assert found.level is level
    assert words in found.text
    assert found.next
    assert (found.exit_code if level is Level.ERROR else 0) == code


@pytest.mark.parametrize("name", SICK)
def test_every_sentence_ends_and_only_what_is_well_has_no_next_step(name: str) -> None:
    for found in findings(SICK[name][0]):
        assert found.text.endswith(".")
        assert found.level is Level.OK or found.next.endswith((".", ")"))
        assert found.level is not Level.ERROR or found.exit_code in (5, 7)
        assert "{" not in found.text + found.next


def test_a_healthy_machine_hears_nothing_but_good() -> None:
    found = findings(HEALTHY)
    assert {f.level for f in found} == {Level.OK}
    assert exit_code(found) == 0
    assert list(report.lines(found))[-1] == "All is well."


def test_the_exit_code_is_that_of_the_first_error() -> None:
    disk = replace(MACHINE, writable=False)
    assert exit_code(findings(replace(HEALTHY, machine=disk))) == 7
    assert exit_code(findings(replace(alone(), machine=disk))) == 5


def test_what_strangers_say_is_fit_for_a_terminal() -> None:
    run = replace(RUN, name="\x1b[2Jnice")
    other = replace(via(Answered.OTHER), reason="\x1b[2Jno")
    for facts in (replace(HEALTHY, run=run), alone(other)):
        assert all("\x1b" not in line for line in report.lines(findings(facts)))


def test_everything_fits_into_json() -> None:
    facts = replace(HEALTHY, peers=(witness(dialled={PORT: Dialled.NONCE}),))
    found = conclude(facts)
    told = json.loads(json.dumps(report.as_json(facts, found, findings(facts))))
    assert told["format"] == report.FORMAT
    assert told["conclusions"]["reach"] == "direct"
    assert told["facts"]["peers"][0]["dialled"] == {str(PORT): "nonce"}
    assert told["facts"]["peers"][0]["seen"] == {"host": PUBLIC, "port": PORT}
    assert {f["level"] for f in told["findings"]} <= {level.value for level in Level}


def test_every_topic_is_in_the_docs_and_every_one_of_the_docs_is_a_topic() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text("utf-8")
    table = page.partition("## What it looks at")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE))
    topics = {f.topic for facts, *_ in SICK.values() for f in findings(facts)}
    assert told == topics
