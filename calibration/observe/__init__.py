"""Observe a running server: drive it with a scenario's workload over HTTP, and record what every request received."""
