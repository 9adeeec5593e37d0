"""Kinds of tokenizers, one a file. `pipeline.tokenizer` has what they have in common and chooses among them."""
