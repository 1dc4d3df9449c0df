"""Commands: one thin file each, `register(subparsers)` declares its options and its function."""
