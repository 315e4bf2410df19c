"""Embeddings to what is known about the model."""
