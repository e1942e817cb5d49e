"""A Hugging Face model directory as other people's tools write it: what each file may hold, checked before any model is built.

JSON, tokenizer files and the headers of safetensors are enough for this: no transformers model, no host.
"""
