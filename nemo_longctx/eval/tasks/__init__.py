"""lm-eval tasks that are installed with the package: YAML files and the functions they name."""
