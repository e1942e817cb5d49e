"""Long-document data: corpus, mixture, packing, curriculum, and windows addressed by token."""
