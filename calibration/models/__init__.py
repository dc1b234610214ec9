"""Real verifiers: loading, stepping, sampling and timing them. Needs torch."""
