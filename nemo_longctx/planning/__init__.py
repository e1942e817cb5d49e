"""FLOPs, memory and layouts, before anything is paid for."""
