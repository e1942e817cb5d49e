"""Figures and pages, each with its data beside it."""
