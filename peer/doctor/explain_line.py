"""Line, machine and role in words: the second half of `explain`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from peer.doctor.conclude import BUSY_RTT_S, Fit, codec_for
from peer.doctor.facts import Conclusions, Facts
from peer.doctor.findings import Finding, Level, rate
from peer.observe.words import clean, plural, size

LOSS_WARN: Final = 0.005
LOSS_BAD: Final = 0.05  # TCP hardly moves any more
RTT_WARN_S: Final = 0.3
MTU_USUAL: Final = 1500
MTU_SMALL: Final = 1280  # what IPv6 takes for granted; less is a tunnel in a tunnel
THIN_BPS: Final = 1e6
DISK_LOW: Final = 2**30
TRAINING_BYTES: Final = 28  # per parameter trained: weights, gradients, AdamW, outer state
CHECKPOINT_BYTES: Final = 16  # per parameter; two are kept, and a third while one is written


# ── the line ─────────────────────────────────────────────────────────────────────────────
def line(facts: Facts, found: Conclusions) -> Iterator[Finding]:
    yield from _bandwidth(facts, found)
    if found.rtt_s is not None:
        if found.rtt_s > RTT_WARN_S:
            yield Finding(
                "rtt", Level.WARNING,
                f"The nearest peer that answered is {found.rtt_s * 1e3:.0f} ms away.",
                "Give `--via` of a peer nearer by if there is one; groups are made of near peers.",
            )  # fmt: skip
        else:
            yield Finding("rtt", Level.OK, f"Round trips take {found.rtt_s * 1e3:.0f} ms.")
    yield from _loss(found)
    if found.mtu and found.mtu < MTU_SMALL:
        yield Finding(
            "mtu", Level.WARNING, f"Packets of only {found.mtu} bytes pass.",
            "See about tunnels (VPN) in tunnels, and the MTU that is set for them.",
        )  # fmt: skip
    elif found.mtu:
        yield Finding("mtu", Level.OK, f"Packets of {found.mtu} bytes pass (the path's MTU).")
    if any(peer.large_stuck for peer in facts.peers):
        yield Finding(
            "mtu-hole", Level.ERROR,
            "Small messages pass, larger ones don't: somewhere large packets vanish silently.",
            "Lower the MTU of the network interface: `ip link set dev NAME mtu 1400`, then look"
            " again; a VPN is the usual cause.", 5,
        )  # fmt: skip


def _bandwidth(facts: Facts, found: Conclusions) -> Iterator[Finding]:
    if found.up_bps is None and found.down_bps is None:
        yield Finding(
            "bandwidth", Level.NOTE, "No peer had bytes to spare for measuring the line.",
            "Look again in a minute, or give another `--via`.",
        )  # fmt: skip
        return
    up, down = rate(found.up_bps), rate(found.down_bps)
    least = " or more: it was over too soon to tell" if found.at_least else ""
    text = f"Up {up}, down {down}{least}."
    if found.up_bps is not None and found.up_bps < THIN_BPS:
        yield Finding(
            "bandwidth", Level.WARNING, text,
            "Join runs with small updates (`lora`, or a thin codec) on this line.",
        )  # fmt: skip
    else:
        yield Finding("bandwidth", Level.OK, text)
    busy = [
        p.rtt_busy_s for p in facts.peers
        if p.rtt_busy_s is not None and p.rtt_s is not None and p.rtt_busy_s - p.rtt_s > BUSY_RTT_S
    ]  # fmt: skip
    if busy and found.upload:
        yield Finding(
            "queue", Level.WARNING,
            f"While this machine sends, round trips grow to {max(busy) * 1e3:.0f} ms: the router"
            " has a long queue.",
            f"Start with `--upload {found.upload}`, so that the rest of the home stays quick.",
        )  # fmt: skip
    elif found.upload:
        yield Finding(
            "queue", Level.WARNING,
            f"--upload promises {rate(facts.upload_bps)}, and the line does {up}.",
            f"Start with `--upload {found.upload}`.",
        )  # fmt: skip
    if facts.running:
        yield Finding(
            "running", Level.NOTE, "A peer trains here meanwhile, and shares the line.",
            "For the line alone, let it leave first: `python -m peer leave`.",
        )  # fmt: skip


def _loss(found: Conclusions) -> Iterator[Finding]:
    known = [value for value in (found.loss_up, found.loss_down) if value is not None]
    if not known:
        yield Finding(
            "loss", Level.NOTE, "Loss of packets could not be measured.",
            "It takes Linux on this side, and peers with time: look again in a minute.",
        )  # fmt: skip
        return
    ways = [
        f"{value * 100:.1f} % {way}"
        for way, value in (("up", found.loss_up), ("down", found.loss_down))
        if value is not None
    ]
    text = f"Packets lost: {', '.join(ways)}."
    if max(known) >= LOSS_BAD:
        yield Finding(
            "loss", Level.WARNING, f"{text} TCP hardly moves on such a line.",
            "Use a cable instead of wireless, or another line; ask the provider.",
        )  # fmt: skip
    elif max(known) >= LOSS_WARN:
        yield Finding(
            "loss", Level.WARNING, text,
            "Rounds bear that, slower; a cable instead of wireless often mends it.",
        )  # fmt: skip
    else:
        yield Finding("loss", Level.OK, text)


# ── machine and role ─────────────────────────────────────────────────────────────────────
def machine(facts: Facts) -> Iterator[Finding]:
    machine, run = facts.machine, facts.run
    if machine is None:
        return
    trained = run.parameters if run is not None and run.method == "pretrain" else 0
    disk_needed = max(DISK_LOW, 3 * CHECKPOINT_BYTES * trained)
    memory_needed = TRAINING_BYTES * trained
    if not machine.writable:
        yield Finding(
            "disk", Level.ERROR, f"The folder {machine.home} can't be written.",
            "Choose another with `--home`, or give this user the right to write there.", 7,
        )  # fmt: skip
    elif machine.disk_free < disk_needed:
        yield Finding(
            "disk", Level.ERROR if trained and machine.disk_free < disk_needed / 2 else
            Level.WARNING,
            f"{size(machine.disk_free)} are free where {machine.home} is;"
            f" this wants {size(disk_needed)}.",
            "Free some space, or choose another folder with `--home`.", 7,
        )  # fmt: skip
    else:
        yield Finding("disk", Level.OK, f"{size(machine.disk_free)} of disk are free.")
    room = machine.device_memory or machine.memory_free
    if machine.memory_total and memory_needed > room > 0:
        yield Finding(
            "memory", Level.WARNING,
            f"Training takes about {size(memory_needed)}, and {machine.device} has {size(room)}"
            " free.",
            "Join a smaller run or a `lora` one, or choose another `--device`.",
        )  # fmt: skip
    elif machine.memory_total:
        yield Finding(
            "memory", Level.OK,
            f"{size(machine.memory_free)} of memory are free;"
            f" {plural(machine.threads, 'thread')}, training on {machine.device}.",
        )  # fmt: skip


def role(facts: Facts, found: Conclusions) -> Iterator[Finding]:
    rate_bps = min(v for v in (found.up_bps, facts.upload_bps, float("inf")) if v is not None)
    if found.role == "aggregator":
        yield Finding(
            "role", Level.OK,
            f"This peer may be elected to aggregate, by its upload of {rate(found.up_bps)}.",
        )  # fmt: skip
    elif found.role == "member":
        yield Finding(
            "role", Level.NOTE, "Others can't call this peer: a member's part suits it best.",
            "Nothing has to be done, as long as the group has one that can be reached.",
        )  # fmt: skip
    threads = facts.machine.threads if facts.machine is not None else 1
    fit = codec_for(facts.run, rate_bps if rate_bps < float("inf") else None, threads)
    if facts.run is not None and fit is not None:
        yield _codec(facts.run.name, facts.run.codec, fit)


def _codec(run: str, codec: str, fit: Fit) -> Finding:
    cost = f"{size(fit.bytes)} in {fit.seconds:.1f} s of the {fit.budget_s:.1f} s there are"
    if fit.fits and not fit.changed:
        return Finding("codec", Level.OK, f"A round of {clean(run)} fits: {fit.codec}, {cost}.")
    if fit.fits:
        return Finding(
            "codec", Level.WARNING,
            f"The run's codec {codec} is too slow on this line; {fit.codec} fits: {cost}.",
            "Ask for `codec.name = \"auto\"` in the run's manifest (or its next one); until then"
            " this peer's work often counts a round later.",
        )  # fmt: skip
    return Finding(
        "codec", Level.WARNING,
        f"No codec makes a round of {clean(run)} fit this line: {fit.codec} still needs {cost}.",
        "Join a smaller run or a `lora` one, or ask for a longer `schedule.exchange_s`.",
    )  # fmt: skip
