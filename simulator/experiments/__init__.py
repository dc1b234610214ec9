"""Several runs: replications, comparisons on the same luck, sweeps with a store."""
