"""The public functions and their registration as torch custom operators."""
