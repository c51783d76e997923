"""Derivatives that replace torch's own."""
