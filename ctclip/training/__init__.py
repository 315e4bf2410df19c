"""Batch to checkpoint."""
