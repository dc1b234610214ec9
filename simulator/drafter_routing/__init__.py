"""Routing: which replica serves a request, and which drafter drafts for it."""
