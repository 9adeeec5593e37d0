"""`gristmill status` and `gristmill verify`: how far a job directory is, and whether it is whole."""

from __future__ import annotations
