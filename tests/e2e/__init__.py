"""Real processes over libp2p on loopback. Slow by nature: each test starts several peers."""
