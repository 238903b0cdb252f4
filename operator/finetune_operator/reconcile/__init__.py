"""Observe, decide, act, and write the status once."""
