"""Parameters that are narrower than the flat state.

:mod:`masters` keeps weights for them on which steps are taken, so that none is too small.
May touch what the rest of vector/ may.
"""
