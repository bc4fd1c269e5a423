"""What the activations look like: the model replayed one decoder layer at a time."""
