"""The network's machines in virtual time."""
