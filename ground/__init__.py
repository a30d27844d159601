"""What every command stands on: its options parsed and checked, its end, files written whole. No torch."""
