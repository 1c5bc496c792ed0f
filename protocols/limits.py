"""Every bound on what strangers can make us hold, send or wait for, with its reason.

Names carry units, unit before the bound. Change one here and it changes everywhere.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1

# ── messages ─────────────────────────────────────────────────────────────────────────────
CONTROL_BYTES_MAX: Final = 64 * 2**10  # a plan for 16 members is < 4 KiB; unary calls stay small
RECORD_BYTES_MAX: Final = 1024  # a DHT value with many subkeys is sent whole: 1 KiB x 1000 = 1 MiB
MANIFEST_BYTES_MAX: Final = 64 * 2**10  # the largest real config is < 10 KiB
NAME_CHARS_MAX: Final = 64  # group names, site labels, run names
TEXT_CHARS_MAX: Final = 512  # reasons and error texts
ADDRESSES_MAX: Final = 8  # per peer: interfaces x protocols; more is noise
ADDRESS_CHARS_MAX: Final = 256  # a relayed multiaddress is about 180 characters

# ── groups ───────────────────────────────────────────────────────────────────────────────
GROUP_MEMBERS_MAX: Final = 16  # all-to-all heartbeats stay cheap; larger cells split
COMPANY_MAX: Final = 1024  # what a peer may claim as its group's size
AGGREGATORS_MAX: Final = 16
UPLOAD_KBPS_COUNTED_MAX: Final = 10**6  # in elections; a claim of 2 Tbit/s must not win them all
ROSTER_MAX: Final = GROUP_MEMBERS_MAX
KNOWN_PEERS_MAX: Final = 4096  # records remembered per run, oldest dropped first
COORDINATE_S_MAX: Final = 1.024  # round the Earth and back is 0.2 s
RTT_S_MAX: Final = 2.0  # a longer round trip is a broken link, and tells nothing about distance

# ── discovery ────────────────────────────────────────────────────────────────────────────
CELL_RECORDS_MAX: Final = 48  # a fuller cell splits; whole groups of 16 fit, and 48 KiB per read
CELL_SAMPLE: Final = 32  # so many of a crowded cell still show themselves: the way down
CELL_LEVELS_MAX: Final = 16  # eight cells in each: 9 levels of place, 7 of hash, 10^14 cells
CELL_GRIDS: Final = 2  # shifted against each other: who is cut apart in one meets in the other
GROUP_CONTACTS: Final = 3  # members of a group that stand in the index of groups

# ── layout ───────────────────────────────────────────────────────────────────────────────
FRAGMENTS_MAX: Final = 16  # of a layout; the paper's smallest are three layers of a model
UNITS_MAX: Final = 2**22  # 64 Ki values each: 2.7e11 parameters
SPAN_MASK_BYTES_MAX: Final = UNITS_MAX // 8
UNIT_BYTES_MAX: Final = 16 * 2**20  # one coded chunk, or the two factors of one adapted layer

# ── streams ──────────────────────────────────────────────────────────────────────────────
FRAME_BYTES_MAX: Final = 256 * 2**10  # larger reads cost 2-3 CPU-s per GB in malloc and faults
STREAM_HEADER_BYTES_MAX: Final = 256 * 2**10
STREAMS_PER_PEER_MAX: Final = 32  # open inbound streams from one stranger
STREAMS_MAX: Final = 256
STATE_BYTES_MAX: Final = 256 * 2**30
ASSET_BYTES_MAX: Final = 64 * 2**30
ASSETS_MAX: Final = 256
OUTCOME_ROUNDS_KEPT: Final = 8  # a peer that missed a few rounds catches up by outcomes alone;
# with fragments: turns of all of them

# ── the ledger of blocks ─────────────────────────────────────────────────────────────────
REPORT_RANGES_MAX: Final = 64  # 3 lists x 16 members x 64 ranges x 11 bytes: 34 KiB, one message
REPORT_BLOCKS_MAX: Final = 2**16  # a card does a few thousand blocks in an hour's round
LEASE_BLOCKS_MAX: Final = 4096  # held at once by one member: what it does in a round or two
LEASE_ROUNDS: Final = 8  # whose work was in no outcome for so long has gone (OUTCOME_ROUNDS_KEPT)
LEDGER_HOLDERS_MAX: Final = 64  # a full group, and those who have gone but may come back
LEDGER_RANGES_MAX: Final = 2**15  # 360 KiB on the wire; one group of 16 has a few hundred
LEDGER_COVER_UNITS_MAX: Final = 2**18  # larger layouts count only what is inside in one go
LEDGER_BYTES_MAX: Final = 4 * 2**20  # the ranges, and a bit per unit and holder
LEDGER_WINDOW_BLOCKS_MIN: Final = 2**14  # small data: some hundred rounds' worth all the same

# ── gossip between groups ────────────────────────────────────────────────────────────────
GOSSIP_SLOTS_MAX: Final = AGGREGATORS_MAX
SLOT_UNITS_MAX: Final = 2**19  # a mask of them is 64 KiB; larger layouts get more slots
CONTACTS_MAX: Final = 4  # of a lending group in a loan: three may vanish while it is unsettled
CONTACT_ADDRESSES_MAX: Final = 2
LOAN_BYTES_MAX: Final = 3 * 2**10  # four contacts with two addresses of the longest kind
LOANS_MAX: Final = 16  # whose mixes ride in one contribution
MIX_NOTES_MAX: Final = 8  # in one outcome; 24 KiB with their loans, beside 34 KiB of block reports
MIXES_PER_UNIT_MAX: Final = 4  # in one outcome; more wait for the next
MIX_COMMIT_ROUNDS: Final = 8  # +d is in an outcome of the borrower by then, or the mix is off
MIX_WINDOW_ROUNDS: Final = 512  # of the lender: -d may come this late, from a far slower group
MIX_ROWS_ADDED: Final = 8  # +d that a state remembers per unit: one a round until its time is up
MIX_ROWS_TAKEN: Final = 56  # and -d; when later loans push it out, a debt can't be paid any more
EXACT_UNITS_MAX: Final = 2**15  # named in one header of 160 KiB; a slot that has more takes turns
CARRIED_MIXES_MAX: Final = 64  # payloads held for others to include
DEBT_TIMEOUT_S: Final = 6 * 3600.0  # nobody of the lending group answered: it has dissolved

# ── time ─────────────────────────────────────────────────────────────────────────────────
CALL_TIMEOUT_S: Final = 5.0  # a unary call; the far side is gone or frozen
PROGRESS_TIMEOUT_S: Final = 5.0  # a stream on which nothing moved
CONNECT_TIMEOUT_S: Final = 10.0
HEARTBEAT_S: Final = 1.0  # while it matters who lives
HEARTBEAT_S_MAX: Final = 600.0  # in a long training phase; each says when its next one is due
SUSPECT_AFTER_S: Final = 3.5  # three heartbeats missed, or one announced for later 2.5 s overdue
FORGET_AFTER_S: Final = 60.0  # a suspected member is no member any more
FIRM_S: Final = 600.0  # who fell silent counts so long as one who may have gone on with others
RECORD_TTL_S: Final = 90.0  # signed records live this long, or three refreshes; clocks differ
RECORD_REFRESH_S: Final = 30.0  # stored again at a third of its life; seldomer in long rounds
RECORD_LIFETIME_S_MAX: Final = 3600.0
CLOCK_SKEW_S_MAX: Final = 30.0  # records issued this far in our future are still believed
DIGEST_WAIT_S: Final = 2.0  # a coordinator waits this long for its members' digests
OUTBOX_MESSAGES_MAX: Final = 256  # per peer; older heartbeats give way first
