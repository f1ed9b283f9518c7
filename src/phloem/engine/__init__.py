"""One step on a device: inputs, forward pass, sampling."""
