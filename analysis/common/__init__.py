"""What several questions share: resampling, records, rounds, threads."""
