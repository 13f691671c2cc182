"""Time and memory of the loss against the alternatives, on the CPU or one GPU.

``tools/benchmark_loss.py`` is the command line. Imports point one way: what is run (``run``) uses
jobs and the meter, jobs use providers, providers use the values that they must have, and those use
problems. Nothing here needs mmengine; a provider of mmseg says why it is left out where mmseg is
missing.
"""
