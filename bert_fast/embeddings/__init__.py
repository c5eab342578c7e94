"""Text to vectors: the tokenizer, the encoder and its pooling. Training is not here."""
