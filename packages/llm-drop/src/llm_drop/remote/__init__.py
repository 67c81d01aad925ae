"""Files that travel with an `hf-remote` checkpoint."""
