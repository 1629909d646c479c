"""Encoders behind search and classification: transformers' modules made fast, their poolings, and batches without
padding. `LLM.embed` and `paceline serve` share all of it."""
