"""Jinja templates that can't hurt: sandboxed, and bounded in size and time."""
