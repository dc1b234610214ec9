"""Several runs: replications, comparisons on common random numbers, sweeps with a store."""
