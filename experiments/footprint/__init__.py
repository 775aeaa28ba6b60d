"""What models cost to train and to run, beside published costs."""
