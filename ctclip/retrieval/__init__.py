"""Embeddings to similar cases."""
