"""Batch to embeddings."""
