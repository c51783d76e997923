"""The only code that differentiates."""
