"""Saving and loading, where torch's own ways ask something of a state.

:mod:`record` writes what an optimizer knows in words and lists as one tensor, so that a state_dict
can be flattened; :mod:`prepare` gives a new optimizer the form of a checkpoint that
torch.distributed.checkpoint is to load; :mod:`file` replaces a file in one piece; :mod:`shards`
divides what lies on several ranks by parameters, for any number of ranks to load.
"""
