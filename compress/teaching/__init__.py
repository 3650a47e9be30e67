"""Training a student on a teacher's predictions: the common parts of healing and distillation."""
