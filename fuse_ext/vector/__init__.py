"""Parameters as one flat vector."""
