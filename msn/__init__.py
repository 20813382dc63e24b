"""Masked Siamese Networks (arXiv 2204.07141)."""
