"""What steps cost, in seconds and joules."""
