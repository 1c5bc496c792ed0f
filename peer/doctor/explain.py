"""Facts and conclusions in words: what is well, what is not, and what to do about it. Pure.

Everything that is not well ends in a next step that its owner can take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from peer.doctor import explain_line
from peer.doctor.facts import (
    Answered,
    Conclusions,
    Facts,
    Nat,
    PortFacts,
    Reach,
    ViaFacts,
)
from peer.doctor.findings import Finding, Level
from peer.doctor.kernel import is_carriers
from peer.doctor.messages import Place, place_of
from peer.observe.words import clean, plural
from protocols import limits

SKEW_WARN_S: Final = 3.0  # hivemind's own idea of one time; ours goes wrong at CLOCK_SKEW_S_MAX


def explain(facts: Facts, found: Conclusions) -> list[Finding]:
    """All findings, in the order in which a person would ask."""
    parts = [_network(facts), _ports(facts), _answers(facts), _clock(found)]
    probed = any(peer.probes for peer in facts.peers)
    if probed:
        parts += [_reach(facts, found), _nat(facts, found)]
    if facts.peers:
        parts.append(_dht(facts))
    if probed and not facts.quick:
        parts.append(explain_line.line(facts, found))
    if facts.machine is not None:
        parts.append(explain_line.machine(facts))
    if probed and not facts.quick:
        parts.append(explain_line.role(facts, found))
    return [finding for part in parts for finding in part]


def exit_code(findings: list[Finding]) -> int:
    """Of the command: that of the first error, or 0."""
    return next((f.exit_code for f in findings if f.level is Level.ERROR), 0)


# ── is there a network, is there a port ──────────────────────────────────────────────────
def _network(facts: Facts) -> Iterator[Finding]:
    if not facts.hosts and not facts.peers:
        yield Finding(
            "network", Level.ERROR, "This machine has no network address but its own loopback.",
            "Connect it to a network (cable, wireless, or the container's network settings).", 5,
        )  # fmt: skip
    if facts.network_error:
        yield Finding(
            "daemon", Level.ERROR, f"libp2p did not start here: {clean(facts.network_error)}.",
            "Do what it says, or try `--host` with an address of this machine.", 5,
        )  # fmt: skip


def _ports(facts: Facts) -> Iterator[Finding]:
    for topic, what, option, port in (
        ("port", "libp2p", "--port", facts.libp2p),
        ("lane-port", "the bulk lane", "--lane-port", facts.lane),
    ):
        yield _port(topic, what, option, port)


def _port(topic: str, what: str, option: str, port: PortFacts) -> Finding:
    if port.error:
        return Finding(
            topic, Level.ERROR, f"No port for {what} can be bound: {clean(port.error)}.",
            "Give `--host` an address of this machine, or leave it away.", 5,
        )  # fmt: skip
    if port.ours:
        return Finding(topic, Level.OK, f"The peer that runs here listens on port {port.port}.")
    if port.port == 0:
        return Finding(topic, Level.OK, f"Any free port will serve for {what}.")
    if port.free:
        return Finding(topic, Level.OK, f"Port {port.port} is free for {what}.")
    if port.given:
        return Finding(
            topic, Level.ERROR, f"Port {port.port} is taken by another program.",
            f"Choose another one with `{option}`, or stop the program that holds it.", 5,
        )  # fmt: skip
    return Finding(
        topic, Level.WARNING, f"Port {port.port}, where this seat's peer listened, is taken.",
        f"The peer will take another one, so its old address is no good; choose one with"
        f" `{option}` if others rely on it.",
    )  # fmt: skip


# ── who answers ──────────────────────────────────────────────────────────────────────────
def _answers(facts: Facts) -> Iterator[Finding]:
    if facts.network_error:
        return  # nobody was asked
    answered = [via for via in facts.vias if via.answered is Answered.YES]
    if facts.vias and answered:
        yield Finding(
            "bootstrap", Level.OK,
            f"Of the known addresses, {len(answered)} of {len(facts.vias)} answered.",
        )  # fmt: skip
    elif facts.vias:
        yield Finding(
            "bootstrap", Level.ERROR,
            f"Of the known addresses, none of {len(facts.vias)} answered.",
            "See below for each; ask a member for its address of today, and give `--via ADDRESS`.",
            5,
        )  # fmt: skip
    else:
        yield Finding(
            "bootstrap", Level.ERROR,
            "No other peer's address is known, so nothing about the line can be measured.",
            "Give `--via ADDRESS`, what another peer printed at its start; or start one elsewhere"
            " with `python -m peer join` or `python -m bootstrap run`.", 5,
        )  # fmt: skip
    for via in facts.vias:
        if via.answered is not Answered.YES:
            yield _silent(via, bool(answered))
    silent = [peer for peer in facts.peers if not peer.probes]
    if silent:
        yield Finding(
            "probes", Level.NOTE,
            f"{plural(len(silent), 'peer')} answered, but would take no probes.",
            "Its program may be older: ask its owner to update, or give another `--via`.",
        )  # fmt: skip


def _silent(via: ViaFacts, others_answer: bool) -> Finding:
    level = Level.WARNING if others_answer else Level.ERROR
    place = place_of(via.address)
    where = str(place) if place is not None else clean(via.address)[:80]
    text, step = _why_silent(via, place, where, others_answer)
    return Finding("via", level, text, step, 0 if others_answer else 5)


def _why_silent(
    via: ViaFacts, place: Place | None, where: str, others_answer: bool
) -> tuple[str, str]:
    match via.answered:
        case Answered.REFUSED:
            return (
                f"{where}: the machine is there, but nothing listens on that port.",
                "Ask its owner to start the peer again, and for its address of today.",
            )
        case Answered.OTHER:
            return (
                f"{where}: something listens, but it is not that peer ({clean(via.reason)[:120]}).",
                "Ask its owner for the address with its id of today (`python -m peer identity`).",
            )
        case Answered.NO_WAY:
            return (
                f"{where}: this machine knows no way there.",
                (
                    "See whether it is online; an address inside another home (192.168..., 10...)"
                    " leads nowhere from outside: ask for a public one."
                ),
            )
    if via.web_port and place is not None and place.port != 443:
        return (
            (
                f"{where}: no packet comes back, but from port 443 of the same machine they do: a"
                f" firewall lets nothing out to port {place.port}, only to web ports."
            ),
            (
                f"Ask who runs the firewall to open outgoing TCP to port {place.port}; or give a"
                " `--via` that ends in /tcp/443/p2p/...: a peer or bootstrap node started with"
                " `--port 443`."
            ),
        )
    if others_answer:
        return (
            f"{where}: no packet comes back, while others answer.",
            (
                "It is switched off, behind a firewall, or the network between you is cut; ask its"
                " owner, or go on without it."
            ),
        )
    return (
        f"{where}: no packet comes back.",
        (
            "Either it is switched off or behind a firewall, or nothing gets out of here: try"
            " `--via` of another peer, best one on port 443, and ask who runs this network whether"
            " outgoing TCP is allowed."
        ),
    )


def _clock(found: Conclusions) -> Iterator[Finding]:
    if found.skew_s is None:
        return
    ahead = -found.skew_s
    text = (
        f"This machine's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} what"
        " the others say"
    )
    step = "Switch on time synchronisation: `timedatectl set-ntp true`."
    if abs(ahead) > limits.CLOCK_SKEW_S_MAX:
        yield Finding(
            "clock", Level.ERROR,
            f"{text}; at more than {limits.CLOCK_SKEW_S_MAX:.0f} s they refuse its records.",
            step, 5,
        )  # fmt: skip
    elif abs(ahead) > SKEW_WARN_S:
        yield Finding("clock", Level.WARNING, f"{text}.", step)
    else:
        yield Finding("clock", Level.OK, "The clock agrees with the others' to a second or three.")


# ── who comes in ─────────────────────────────────────────────────────────────────────────
def _reach(facts: Facts, found: Conclusions) -> Iterator[Finding]:
    port = facts.libp2p.port or 31337
    match found.reach:
        case Reach.DIRECT:
            yield Finding("reach", Level.OK, "Peers outside can open connections to this machine.")
            if found.lane is False:
                yield Finding(
                    "lane-reach", Level.NOTE,
                    f"They can't at the bulk lane's port {facts.lane.port}; libp2p carries bulk.",
                    f"On a fast line let it in too, and give `--lane-port {facts.lane.port}`.",
                )  # fmt: skip
        case Reach.RELAY:
            yield Finding(
                "reach", Level.WARNING,
                f"Peers outside reach this machine only through the relay {clean(found.relay)}.",
                f"Forward TCP port {port} in the router if you can; it works without, slower.",
            )  # fmt: skip
        case Reach.REFUSED if found.nat is Nat.NONE:
            yield Finding(
                "reach", Level.WARNING,
                "The address is public, but a firewall refuses connections from outside.",
                f"Let TCP port {port} in (for example `ufw allow {port}/tcp`), and start with"
                f" `--port {port}`; it works without, slower, through peers that offer `--relay`.",
            )  # fmt: skip
        case Reach.REFUSED:
            yield Finding(
                "reach", Level.WARNING,
                "The router lets nobody in from outside.",
                f"Forward TCP port {port} in the router to this machine (or switch on UPnP there),"
                f" and start with `--port {port}`; it works without, slower, through peers that"
                " offer `--relay`.",
            )  # fmt: skip
        case _:
            yield Finding(
                "reach", Level.NOTE,
                "Whether peers outside can reach this machine is not known: nobody who could try"
                " was asked from outside.",
                "Give `--via` of a peer or bootstrap node with a public address.",
            )  # fmt: skip


def _nat(facts: Facts, found: Conclusions) -> Iterator[Finding]:
    seen = [p.seen for p in facts.peers if p.outside and p.seen is not None]
    host = seen[0].host if seen else ""
    carrier = any(is_carriers(own) for own in facts.hosts)
    match found.nat:
        case Nat.NONE:
            yield Finding("nat", Level.OK, f"No NAT: the world sees this machine's own {host}.")
        case Nat.CONE:
            text = (
                f"A NAT shows {host} and the same port to everybody (a cone, as most home routers)."
            )
            if found.reach is Reach.DIRECT:
                yield Finding("nat", Level.OK, text)
            else:
                yield Finding(
                    "nat", Level.NOTE, f"{text} Other such peers may be met directly.",
                    "Forwarding a port makes it sure; nothing else needs to be done.",
                )  # fmt: skip
        case Nat.SYMMETRIC:
            yield Finding(
                "nat", Level.OK if found.reach is Reach.DIRECT else Level.WARNING,
                f"A symmetric NAT shows {host} with another port to everybody, so that two peers"
                " behind such ones can't meet directly"
                + (" (the provider's, to judge by the address)." if carrier else "."),
                "Forward a port in the router, use another line than a mobile one, or see that the"
                " group has a member that can be reached.",
            )  # fmt: skip
        case Nat.SOME:
            yield Finding(
                "nat", Level.NOTE,
                f"A NAT shows {host}; of which kind can't be told with one observer outside.",
                "Give a second `--via` on another machine to find out.",
            )  # fmt: skip
        case _:
            yield Finding(
                "nat", Level.NOTE,
                "Whether there is a NAT is not known: everybody who answered is on this network.",
                "Give `--via` of a peer or bootstrap node out on the internet.",
            )  # fmt: skip


def _dht(facts: Facts) -> Iterator[Finding]:
    told = max((peer.dht_nodes for peer in facts.peers), default=0)
    most = max(told, facts.dht_nodes)
    if most:
        yield Finding("dht", Level.OK, f"The DHT has {plural(most, 'other node')} or more.")
    else:
        yield Finding(
            "dht", Level.WARNING, "Peers answer, but none is a node of the DHT.",
            "Give `--via` of a peer that trains, or of a bootstrap node.",
        )  # fmt: skip
