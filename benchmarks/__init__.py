"""What Trimtab costs, beside the bare forward pass and beside its peers: `make bench`, or `python -m benchmarks.run`.

The driver (`run.py`) goes through the cases (`cases.py`) and has every way of a case run once in each round, one after
another, by workers (`worker.py`): one in Trimtab's environment (`ours/`), one in that of the peers (`peers.py`). Each
worker also runs the way without any library (`bare.py`), by which its others are divided, so that another version of
transformers does not count. `page.py` and `plots.py` write docs/benchmarks.md from the rounds.
"""
