"""Recorded behaviour compiled for replay: run lengths, signals, continuations."""
