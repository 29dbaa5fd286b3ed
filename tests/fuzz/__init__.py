"""Inputs from anywhere: mutated folders, files and command lines through the real commands.

`make fuzz` runs it for as long as it is told; `tests/test_fuzz.py` runs a short slice. `server` holds a process with
everything imported, of which each command is a fork; `mutations` spoils files; `kinds` says what is spoilt and which
commands read it; `__main__` runs and reports.
"""
