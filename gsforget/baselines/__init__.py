"""Other ways to forget, to measure beside: a function of model, images, mask and request each (see `base`)."""
