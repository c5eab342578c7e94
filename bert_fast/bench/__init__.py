"""``bert-fast bench``: every kernel and model against the peers users would pick, in one run.

* ``works``: what is measured: inputs, definition, and what it costs at the least.
* ``peers``: who does it: our backends, PyTorch's ways, other engines; a class and a line each.
* ``timing``: how: contestants in turn, on the CPU's clock or by CUDA events and graphs.
* ``run``: correctness before speed, then the timing, as rows.
* ``report``: rows as a table, JSON, plots; and what moved between two JSON files.
* ``command``: the command line.
"""
