"""Measuring: how fast the device reads memory, and how much of that a generation used."""
