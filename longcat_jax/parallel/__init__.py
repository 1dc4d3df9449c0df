"""Work over many devices: how tokens reach their experts, and queries their keys."""
