"""Checkpoints: families written as named spaces, geometry, presets, and the Hugging Face models they
describe.
"""
