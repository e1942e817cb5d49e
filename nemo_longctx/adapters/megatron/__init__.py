"""The joint to Megatron-Core alone: neither NeMo nor Lightning is imported here."""
