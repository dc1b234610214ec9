"""Drafters that are trained here: their networks, shapes, corpora and folders. Needs torch."""
