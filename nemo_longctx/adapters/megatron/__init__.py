"""The joint to Megatron-Core alone: neither NeMo nor Lightning is imported here."""

from nemo_longctx.capability import MEGATRON_RANGE, check_host

check_host(MEGATRON_RANGE)
