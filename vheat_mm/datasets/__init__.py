"""What the samples of a data set hold."""
