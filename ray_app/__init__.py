"""Machines and models: study files, plans, capture on Ray actors, and the command line."""
