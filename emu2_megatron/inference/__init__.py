"""Text, visual embeddings and boxes from a trained model: docs/inference.md."""
