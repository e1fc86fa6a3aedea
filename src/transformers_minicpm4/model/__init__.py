"""What a checkpoint is: configuration, model, conversion."""
