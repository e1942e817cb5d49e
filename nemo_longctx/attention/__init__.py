"""Causal attention over documents, and a loss that never holds the logits of all tokens."""
