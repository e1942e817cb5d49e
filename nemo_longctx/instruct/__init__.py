"""Long instruction data made without human labels."""
