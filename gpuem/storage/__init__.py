"""Byte extents -> bytes in memory."""
