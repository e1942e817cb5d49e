"""Evaluation: probes, scoring with shared prefixes, loss by position."""
