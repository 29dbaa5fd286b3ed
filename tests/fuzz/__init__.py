"""Inputs from anywhere: mutated folders, files and command lines through the real commands, each in a fork of a process
that has everything imported. `mutations` spoils files; `kinds` lists the inputs and the commands that read them.
"""
