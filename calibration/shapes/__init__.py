"""Shapes of models: parameter counts, work and memory of a step, without loading any weights."""
