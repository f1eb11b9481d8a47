"""How generation is measured, judged and reported: turns, samples, run folders, tables, plots, verdicts.

May import kvcache, never the reverse. Importing this package brings nothing along but the count of this
process's cores. Its names live in the modules:
`bench.case.Sweep` spans a grid, `bench.store.run_folder` reads and writes run folders, `bench.analysis.frames` makes
tidy tables of them, none of which needs torch.
"""

from bench.machine import affinity as _affinity  # noqa: F401  # counts the cores before any import that binds this thread

__all__: list[str] = []
