"""Quantization: fewer bits a weight, with the proof that the model is still the same."""
