"""RoPE variants and their analysis: pure functions over NumPy."""
