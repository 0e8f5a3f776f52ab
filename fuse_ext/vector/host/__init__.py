"""Rows of the history in the host's memory, of parameters that lie on a device.

:mod:`rows` has the ops on them, and what host and device keep for each other.
May touch what the rest of vector/ may.
"""
