"""Sharding-first training of GPT-like models with JAX and Flax Linen."""
