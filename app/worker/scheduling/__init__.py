"""Which sequences take part in a step of the model."""
