"""Seed to a cohort of chest CTs and reports on disk."""
