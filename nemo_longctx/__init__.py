"""Long-context continual pretraining for NVIDIA NeMo."""
