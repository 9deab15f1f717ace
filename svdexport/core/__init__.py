"""Mathematics only: tensors in, tensors out; no files, no transformers."""
