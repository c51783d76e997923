"""Stage 1: which curvature matrix. A direct function for people and the need that calls it."""
