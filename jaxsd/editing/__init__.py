"""Changing pictures that are there: each file one way, each function short."""
