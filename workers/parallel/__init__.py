"""Experts across ranks: where they lie and how tokens travel to them."""
