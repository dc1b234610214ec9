"""One simulation from a scenario to a result: what takes part, put together and run."""
