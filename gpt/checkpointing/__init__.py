"""Workdirs and the checkpoints in them: saving, verifying, restoring, and opening trained models."""
