"""Weights from and to Hugging Face folders, without building a model: docs/conversion.md."""
