"""What is trained: base model, quantization, adapter, and the automatic choices."""
