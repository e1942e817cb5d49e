"""The joints to the host: the only rooms that import nemo, megatron, lightning or lm_eval."""

from nemo_longctx.start import remove_stale_locks

remove_stale_locks()  # before any of them is imported
