"""The paper, reproduced: ``python -m benchmarks.paper``.

Each module of sections has

- ``SECTIONS``: title by name, such as ``{"fig1": "Fig. 1: 2-D Rosenbrock"}``;
- ``cells(name, quick, data, done)``: the :class:`~benchmarks.harness.cells.Cell` s of a section.
  ``done`` has the results so far by key. It is called again after they have run, until it names no
  new ones, so that cells may depend on the results of others (a learning rate, say). Sections may
  share cells: one key, one cell;
- ``report(name, results, quick)``: the section's :class:`~benchmarks.paper.page.Report` from the
  results of its cells;
- ``ready(name, results, quick)``, where a report can be made of some of a section's cells: whether
  these are enough. Without it all are needed.
"""
