"""Clocks, devices, ceilings, and what the machine is."""
