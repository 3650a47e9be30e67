"""Training a model to say what another says: what healing and distillation share."""
