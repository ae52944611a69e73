"""A domain bundle: the actions and answers that a model was trained for, and what may leave the device of them."""
