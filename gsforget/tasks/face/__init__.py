"""Face recognition, or any other open-set identification: embeddings, of which a margin head has taught the training."""
