"""Long data worth training on: documents judged by rules, duplicates found, long documents assembled; `nemo-longctx curate`."""
