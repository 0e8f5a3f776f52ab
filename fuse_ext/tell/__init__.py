"""Report and memory."""
