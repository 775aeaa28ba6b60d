"""The cost of training and of running models, beside published costs."""
