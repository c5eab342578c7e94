"""Text to weights: pre-training and fine-tuning, their data, optimizers and figures."""
