"""The joint to NVIDIA NeMo 2.7 / Lightning / Megatron-Core."""
