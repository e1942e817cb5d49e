"""Windows of tokens for NeMo's trainer: Lightning data modules and the sampler that follows the curriculum."""
