"""The joints to the host: the only rooms that import nemo, megatron, lightning or lm_eval."""
