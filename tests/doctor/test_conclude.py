"""From facts to conclusions: kinds of NAT, who comes in, loss, role, codec and budget."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peer.doctor.conclude import codec_for, conclude
from peer.doctor.facts import Flow, Nat, Reach
from peer.doctor.messages import Dialled, Place
from tests.doctor.patients import HEALTHY, OWN, PORT, PUBLIC, RUN, behind, everyone, witness

ONE, OTHER = Place(PUBLIC, 40001), Place(PUBLIC, 40002)


def test_who_is_seen_as_it_is_stands_behind_no_nat() -> None:
    assert conclude(HEALTHY).nat is Nat.NONE


def test_one_port_for_everybody_is_a_cone_and_different_ones_are_symmetric() -> None:
    assert conclude(behind(ONE, ONE)).nat is Nat.CONE
    assert conclude(behind(ONE, OTHER)).nat is Nat.SYMMETRIC
    assert conclude(behind(ONE)).nat is Nat.SOME


def test_two_witnesses_at_one_address_are_one() -> None:
    facts = behind(ONE, ONE)
    twins = tuple(replace(peer, address=facts.peers[0].address) for peer in facts.peers)
    assert conclude(replace(facts, peers=twins)).nat is Nat.SOME


def test_a_connection_from_another_port_of_ours_says_nothing_of_the_nat() -> None:
    facts = behind(ONE, ONE, OTHER)
    odd = replace(facts.peers[2], sent_from=Place(OWN, 5555))
    assert conclude(replace(facts, peers=(*facts.peers[:2], odd))).nat is Nat.CONE


def test_neighbours_are_no_witnesses_of_the_world() -> None:
    found = conclude(everyone(outside=False))
    assert (found.nat, found.reach, found.role) == (Nat.UNKNOWN, Reach.UNKNOWN, "unknown")


def test_one_who_came_in_is_enough_and_silence_of_all_is_a_no() -> None:
    peers = (witness(0, dialled={PORT: Dialled.SILENT}), witness(1))
    assert conclude(replace(HEALTHY, peers=peers)).reach is Reach.DIRECT
    assert conclude(replace(HEALTHY, peers=peers[:1])).reach is Reach.REFUSED


@pytest.mark.parametrize("outcome", [Dialled.RELAYED, Dialled.DECLINED])
def test_what_nobody_tried_is_no_refusal(outcome: Dialled) -> None:
    assert conclude(everyone(dialled={PORT: outcome})).reach is Reach.UNKNOWN


def test_an_open_lane_does_not_make_libp2p_reachable() -> None:
    facts = everyone(dialled={PORT: Dialled.SILENT, 4444: Dialled.NONCE})
    found = conclude(replace(facts, lane=replace(HEALTHY.lane, port=4444)))
    assert (found.reach, found.lane) == (Reach.REFUSED, True)


def test_the_clock_is_a_median_so_that_one_liar_changes_nothing() -> None:
    peers = (witness(0), witness(1), witness(2, skew_s=1e6))
    assert conclude(replace(HEALTHY, peers=peers)).skew_s == pytest.approx(0.1)


def test_loss_is_counted_over_all_paths_and_few_segments_say_nothing() -> None:
    assert conclude(everyone(up=Flow(segments=200, repeated=6))).loss_up == pytest.approx(0.03)
    assert conclude(everyone(up=Flow(segments=20, repeated=20))).loss_up is None
    assert conclude(everyone(up=Flow(segments=200, repeated=900))).loss_up == 1.0


def test_a_codec_follows_from_the_line() -> None:
    fit = codec_for(RUN, 40e6, 4)
    assert fit is not None
    assert (fit.codec, fit.fits, fit.changed) == ("q4", True, False)
    thin = codec_for(RUN, 1e6, 4)
    assert thin is not None
    assert thin.fits
    assert thin.changed
    assert thin.codec != "q4"
    hopeless = codec_for(replace(RUN, parameters=10**9), 1e5, 4)
    assert hopeless is not None
    assert not hopeless.fits
    auto = codec_for(replace(RUN, codec="auto"), 1e6, 4)
    assert auto is not None
    assert auto.fits
    assert not auto.changed


def test_adapters_are_sent_exactly_and_an_unknown_line_carries_nothing() -> None:
    assert codec_for(replace(RUN, method="lora"), 1e6, 4) is None
    assert codec_for(RUN, None, 4) is None
    assert codec_for(None, 1e6, 4) is None


def test_a_long_queue_asks_for_a_budget_below_the_line() -> None:
    assert conclude(everyone(rtt_busy_s=0.9)).upload == "32mbit"
    assert conclude(HEALTHY).upload == ""
    assert conclude(replace(everyone(rtt_busy_s=0.9), upload_bps=10e6)).upload == ""
