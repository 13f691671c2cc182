"""Paired accuracy benchmarks: files, records, jobs, tuning, tables and plots.

``tools/benchmark_miou.py`` is the command line. Imports point one way: jobs and the report use
tuning, which uses files; a job, a process of its own, uses none of them.
"""
