"""A recipe as NeMo's own parts and a run over them: trainer, callbacks, executors."""
