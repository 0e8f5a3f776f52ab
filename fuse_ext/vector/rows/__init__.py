"""Plain parameters that all ranks hold, each of which keeps state for its own rows alone.

:mod:`rows` divides them, and gathers what was moved. May touch what the rest of vector/ may.
"""
