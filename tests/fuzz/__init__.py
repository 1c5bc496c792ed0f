"""Attacks on what reads strangers' bytes: `python -m tests.fuzz codecs --frames N`."""
