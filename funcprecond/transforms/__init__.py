"""Transforms that are chained with a method or wrapped around it."""
