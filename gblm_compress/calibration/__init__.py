"""Measurements on samples: blocks with their inputs, statistics, gradients."""
