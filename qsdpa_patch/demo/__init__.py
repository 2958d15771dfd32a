"""``qsdpa demo``: a small real model, generating over quantized caches with the patch on, measured against itself."""
