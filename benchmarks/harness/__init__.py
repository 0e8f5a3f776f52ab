"""What the benchmarks are made of. Nothing here is run by a person.

- ``command``, ``rounds``, ``tables``, ``saving``, ``pictures``: a benchmark from its command line
  over interleaved rounds to JSON, Markdown and PNG; ``machine`` says on what it ran;
- ``workloads``, ``pinn``, ``networks``, ``datasets``: what is minimised; ``peers``: by whom else;
- ``iteration_adam``, ``iteration_lbfgs``, and ``limits`` (with ``limits.cpp``) and
  ``iteration_limits``, what a machine allows: the parts of ``per_iteration``; ``memory_case``: one
  process of ``memory``;
- ``cells``: many runs, each stored and not run again; ``minibatch``, ``comparison`` and
  ``comparison_pictures``: training on images, shared by ``stochastic`` and ``paper``;
- ``optimizers``, from ``ours`` or ``rivals``: an optimizer from its description; ``schedules``,
  ``rate_search``: learning rates over a run, and the best one of a grid that grows.
"""
