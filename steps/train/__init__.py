"""Training: fine-tuning of adapters and of whole models."""
