"""How it is measured and told: turns, samples, run folders, tables, plots, verdicts.

May import kvcache, never the reverse. Importing this package brings nothing along. Its names live in the modules:
`bench.case.Sweep` spans a grid, `bench.store.run_folder` reads and writes run folders, `bench.analysis.frames` makes
tidy tables of them, none of which needs torch.
"""

__all__: list[str] = []
