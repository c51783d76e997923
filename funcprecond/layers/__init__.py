"""What a layer's inputs and output gradients give."""
