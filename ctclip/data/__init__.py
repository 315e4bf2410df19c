"""Disk to batch."""
