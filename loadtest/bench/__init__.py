"""Benchmarks: `argosy bench NAME`. Each prints what it measures, the limit it could reach, a table, and JSON lines."""
