"""What is measured on samples.

Blocks with their inputs, statistics, gradients; in memory, on disk or on several processes.
"""
