"""What is measured on text.

Samples, blocks with their inputs, statistics, gradients; in memory, on disk or on several processes.
"""
