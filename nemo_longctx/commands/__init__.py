"""Commands of `nemo-longctx`: each module has configure(parser) and run(args) -> exit status."""
