"""The layers of a model, and the curvature that follows from their inputs and output gradients."""
