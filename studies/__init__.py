"""Fits and pages from public measurements; not installed."""
