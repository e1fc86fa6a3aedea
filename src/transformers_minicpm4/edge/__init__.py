"""Where the model runs when the machine is small: what the device is, what fits into it, what a token costs there."""
