"""Hugging Face's own models, made faster where they stand: ``accelerate``, ``restore``, and
``attn_implementation="bert_fast"``, which importing this registers."""

from bert_fast.hugging_face.accelerated import FAMILIES, accelerate, restore

__all__ = ["FAMILIES", "accelerate", "restore"]
