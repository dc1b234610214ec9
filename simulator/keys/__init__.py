"""The tables of a scenario, one strict model each."""
