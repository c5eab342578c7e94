"""Text to vectors: ``encoder`` (the model around it all), ``tokenizer`` (texts to ids, batches),
``pooling`` (token vectors to one) and ``settings`` (a checkpoint's small JSON files).

Training is not here, and neither are the models themselves.
"""
