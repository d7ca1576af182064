"""Transformers models that read packed rows: loading, trust, attention, heads, export."""
