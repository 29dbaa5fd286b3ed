"""Models on disk and in memory.

Finding, checking, loading, their layers, and the manifest of what was done to them.
"""
