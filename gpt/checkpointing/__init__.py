"""Workdirs and checkpoints."""
