"""What policies and engines share: the round, the protocols of stopping and placement, and the log of a run."""
