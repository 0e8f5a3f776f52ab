"""Within optim/: the forms in which a state is saved and loaded.

What lies on several ranks is saved as DTensors (``shards``), which torch.distributed.checkpoint
divides anew for another number of them.
"""
