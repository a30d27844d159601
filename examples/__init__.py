"""What demo.py --real is made of: real language weights from a package, and product texts written here."""
