"""Fits of costs that come from a model's shape, on part of public measurements, and their errors on the rest."""
